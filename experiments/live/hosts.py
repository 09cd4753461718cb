"""The hosts of a trial: real processes that share the blocks of a run, some of which are killed and started again."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import psutil

from common.errors import UnavailableError
from coordinator.blocks import block_list_text, split_blocks
from experiments.live.processes import cpu_seconds_of, wait_until
from node.averaging.events import ExchangeEvent
from node.host.events import AnnouncedEvent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from experiments.live.processes import Node, ProcessSwarm
    from protocol.manifest import Manifest

START_TIMEOUT_S = 120.0


class Hosts:
    """Hosts of `swarm`, each with its share of the blocks; `kills` counts those that were replaced."""

    def __init__(self, swarm: ProcessSwarm, manifest: Manifest, count: int) -> None:
        self._swarm = swarm
        shares = split_blocks(manifest.model, count, manifest.averaging.target_replicas)
        self._blocks = [block_list_text(blocks) for blocks in shares]
        self._nodes = [self._start(index) for index in range(count)]
        self._starts = [1] * count
        self._gone_cpu_s = 0.0
        self.kills = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def wait_until_joined(self) -> None:
        """Wait until every host has announced its blocks; raises DeadlineError, or UnavailableError if one ended."""
        wait_until(lambda: all(map(self.has_joined, range(len(self)))), "every host has joined", START_TIMEOUT_S)

    def has_joined(self, index: int) -> bool:
        """Whether a host, as it was started last, has announced its blocks; raises UnavailableError if it has ended."""
        node = self._nodes[index]
        if node.child.ended():
            raise UnavailableError(f"{node.folder.name} ended by itself:\n{node.child.log_tail()}")
        return len(node.told(AnnouncedEvent)) >= self._starts[index]

    def replace(self, index: int) -> None:
        """Kill a host, as a power cut would, and start it again with what it has on its disk."""
        node = self._nodes[index]
        self._gone_cpu_s += node.cpu_seconds()
        node.kill()
        self._starts[index] += 1
        self._nodes[index] = self._start(index)
        self.kills += 1

    def cpu_seconds(self) -> float:
        """Processor time of all processes below this one, and of the hosts that were killed."""
        return self._gone_cpu_s + sum(map(cpu_seconds_of, psutil.Process().children(recursive=True)))

    def addresses(self) -> set[tuple[str, str]]:
        """Peer id and endpoint of each, as it announced itself last."""
        announced = [node.told(AnnouncedEvent)[-1] for node in self._nodes]
        return {(event.peer_id, event.endpoint) for event in announced}

    def exchanges(self) -> list[ExchangeEvent]:
        """What all of them have told of averaging, one host after the other."""
        return [event for node in self._nodes for event in node.told(ExchangeEvent)]

    def _start(self, index: int) -> Node:
        return self._swarm.host(f"host-{index}", self._blocks[index])


class Churn:
    """Replaces a host, whichever, at each of the steps in `due`, while that step is under way.

    A host that has not joined replaces nobody: the next kill waits for the last one.
    """

    def __init__(self, hosts: Hosts, due: Sequence[int], seed: int) -> None:
        self._hosts, self._due, self._random = hosts, list(due), random.Random(seed)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kilohive-churn")
        self._replacing: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def before_step(self, step: int) -> None:
        """Begin to replace a host if it is time; raises what replacing the last one has raised."""
        if self._due and step >= self._due[0] and self._has_joined():
            del self._due[0]
            index = self._random.randrange(len(self._hosts))
            self._replacing = index, self._pool.submit(self._hosts.replace, index)

    def finish(self) -> None:
        """Wait until the last one has joined; raises DeadlineError, or what replacing it has raised."""
        self._due = []
        wait_until(self._has_joined, "the host that was started last has joined", START_TIMEOUT_S)

    def _has_joined(self) -> bool:
        if self._replacing is None:
            return True
        index, future = self._replacing
        if not future.done():
            return False
        future.result()
        return self._hosts.has_joined(index)


def kill_steps(steps: int, kills: int) -> list[int]:
    """Return the steps before which hosts are killed: evenly spread, the ends left out."""
    return [steps * (kill + 1) // (kills + 1) for kill in range(kills)]
