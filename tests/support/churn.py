"""Hosts that come and go under a swarm: every so often one is killed and another starts. Real processes.

Who is killed is known here, so that what the directory still says of the dead, whose records take `TTL_S` to expire,
does not count: a block is lost when no host that lives announces it and, asked, says that it holds it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import KilohiveError
from protocol import expert_pb2 as pb
from protocol.manifest import BlockId, all_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from experiments.live.processes import Node, ProcessSwarm
    from node.trainer.swarm_client import SwarmClient
    from protocol.endpoints import Address

DESCRIBE_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class ChurnConfig:
    """One host killed and another started every `period_s`, `kills` times; hosts are looked at every `check_s`.

    Where a machine is so busy that a host takes longer than a period to start, the next kill waits for it: a host that
    has not joined replaces nobody.
    """

    kills: int
    period_s: float = 20.0
    check_s: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """How many live hosts serve each block, so many seconds after the first kill."""

    at_s: float
    replicas: dict[BlockId, int]

    def lost(self) -> list[str]:
        """Blocks that nobody serves."""
        return [str(block) for block, n in self.replicas.items() if not n]


class Churn:
    """Starts hosts, then kills and replaces them; `checks` is what was seen. Times are since the first kill.

    `choose` says which of those that are announced is killed next, whatever they hold, just joined or not.
    """

    def __init__(
        self,
        swarm: ProcessSwarm,
        client: SwarmClient,
        host_arguments: Sequence[str],
        choose: Callable[[random.Random, Sequence[Node]], Node] = random.Random.choice,
    ) -> None:
        self._swarm, self._client, self._host_arguments = swarm, client, tuple(host_arguments)
        self._describe = pb.DescribeRequest(run_id=client.manifest.run_id)
        self._choose = choose
        self._killed_ids: set[str] = set()
        self.hosts: list[Node] = []
        self.killed: list[Node] = []
        self.kill_times_s: list[float] = []
        self.checks: list[Check] = []

    def start_host(self) -> Node:
        """Start one more; returns before it is announced."""
        state = self._swarm.folder / f"host-{len(self.hosts)}"
        flags = ("--join", str(self._swarm.swarm_file), "--state", str(state), *self._host_arguments)
        host = self._swarm.start(state.name, "host", *flags)
        self.hosts.append(host)
        return host

    def run(self, config: ChurnConfig, others: Sequence[Node]) -> None:
        """Kill, replace, watch, again and again. AssertionError if `others` end, or a host that nobody killed."""
        rng = random.Random(config.seed)
        began_s = time.monotonic()
        for _ in range(config.kills):
            next_s = time.monotonic() + config.period_s
            self.kill_times_s.append(round(time.monotonic() - began_s, 1))
            self._kill_one(rng)
            joiner = self.start_host()
            while time.monotonic() < next_s or not joiner.events("announced"):
                assert time.monotonic() < next_s + JOIN_TIMEOUT_S, f"a joiner did not join:\n{joiner.child.log_tail()}"
                looked_s = time.monotonic()
                self.checks.append(Check(at_s=round(looked_s - began_s, 1), replicas=self.live_replicas()))
                self._nobody_else_ended(others)
                time.sleep(max(0.0, looked_s + config.check_s - time.monotonic()))

    def live_replicas(self) -> dict[BlockId, int]:
        """How many hosts serve each block: announced, not killed, and they say so themselves when asked."""
        view = self._client.directory.snapshot(with_avoided=True).without(frozenset(self._killed_ids))
        living = [replica for replicas in view.replicas.values() for replica in replicas]
        held = {address: self._held_at(address) for address in sorted({replica.address for replica in living})}
        counts = Counter(replica.block for replica in living if replica.block in held[replica.address])
        return {block: counts[block] for block in all_blocks(self._client.manifest.model)}

    def _held_at(self, address: Address) -> frozenset[BlockId]:
        asked = self._client.client.describe(address, self._describe, DESCRIBE_TIMEOUT_S)
        try:
            answer = self._client.call(asked, DESCRIBE_TIMEOUT_S + 1)
        except KilohiveError:
            return frozenset()
        return frozenset(BlockId(block.layer, block.block) for block in answer.blocks)

    def _kill_one(self, rng: random.Random) -> None:
        announced = [host for host in self.hosts if host not in self.killed and host.events("announced")]
        victim = self._choose(rng, announced)
        victim.kill()
        self.killed.append(victim)
        self._killed_ids.add(victim.events("announced")[-1]["peer_id"])

    def _nobody_else_ended(self, others: Sequence[Node]) -> None:
        for node in (*others, *self.hosts):
            if node not in self.killed:
                assert not node.child.ended(), f"{node.folder.name} ended by itself:\n{node.child.log_tail()}"
