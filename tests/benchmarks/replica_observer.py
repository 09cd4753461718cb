"""How far a block's replicas are apart: an observer downloads both from their hosts, as any peer of a swarm can."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from common.errors import KilohiveError
from node.averaging.client import AveragingClient
from node.averaging.exchange import ExchangeConfig
from node.averaging.gossip import GossipLimits, relative_distance
from node.averaging.replica_set import ReplicaSet
from node.membership.config import SwarmConfig
from node.model.experts.block import new_block
from node.model.experts.state import block_state
from node.model.replica_state import schema
from node.trainer.swarm_client import SwarmClient
from protocol.identity import Identity
from protocol.manifest import all_blocks
from protocol.security import Security

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from dht.view import Replica
    from node.model.replica_state import TensorSchema
    from protocol.manifest import BlockId, Manifest

JOIN_TIMEOUT_S = 60.0
DOWNLOAD_TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """Divergence of each block, by its name, between two moments (seconds since 1970).

    `missed` blocks had not two replicas that could be downloaded; `cpu_s` are this process's alone.
    """

    began_s: float
    ended_s: float
    divergence: dict[str, float]
    missed: int = 0
    cpu_s: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every block was looked at."""
        return bool(self.divergence) and not self.missed

    @property
    def largest(self) -> float:
        """Of all blocks that were looked at."""
        return max(self.divergence.values(), default=0.0)

    @property
    def mean(self) -> float:
        """Of all blocks that were looked at."""
        return statistics.mean(self.divergence.values()) if self.divergence else 0.0

    def words(self) -> str:
        """For a line of progress."""
        took_s = self.ended_s - self.began_s
        missed = f", {self.missed} blocks not seen" if self.missed else ""
        return f"divergence at most {self.largest:.3%}, mean {self.mean:.3%} (looked at in {took_s:.1f} s{missed})"


class Observer:
    """A peer that hosts and trains nothing. Enter it before the first check."""

    def __init__(self, swarm_file: Path) -> None:
        self._client = SwarmClient(SwarmConfig(swarm=swarm_file, join_timeout_s=JOIN_TIMEOUT_S))
        self._stack = ExitStack()
        self._averaging: AveragingClient
        self._wanted: dict[BlockId, tuple[TensorSchema, ...]]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._client)
            manifest = self._client.manifest
            self._wanted = {block_id: schema_of(manifest, block_id) for block_id in all_blocks(manifest.model)}
            self._averaging = AveragingClient(
                ReplicaSet(), exchange_config(manifest), Security(Identity.generate()).caller()
            )
            stack.callback(lambda: self._client.call(self._averaging.close(), CLOSE_TIMEOUT_S))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self) -> Check:
        """Look at every block once, one after the other: no host has more than one download at a time to answer."""
        began_s, cpu_s = time.time(), time.process_time()
        found = self._client.call(self._look_at_all(), CHECK_TIMEOUT_S)
        divergence = {str(block_id): distance for block_id, distance in found.items() if distance is not None}
        return Check(
            began_s=began_s,
            ended_s=time.time(),
            divergence=divergence,
            missed=len(found) - len(divergence),
            cpu_s=time.process_time() - cpu_s,
        )

    async def _look_at_all(self) -> dict[BlockId, float | None]:
        view = self._client.directory.snapshot(with_avoided=True)
        return {block_id: await self._look_at(block_id, view.replicas[block_id]) for block_id in self._wanted}

    async def _look_at(self, block_id: BlockId, replicas: Sequence[Replica]) -> float | None:
        if len(replicas) != 2:
            return None
        wanted = self._wanted[block_id]
        try:
            one, other = await asyncio.gather(
                *(
                    self._averaging.download(r.address, block_id, wanted, DOWNLOAD_TIMEOUT_S, params_only=True)
                    for r in replicas
                )
            )
        except KilohiveError:
            return None
        return distance(one.params, other.params)


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """L2 norm of the difference of all tensors, over the smaller of both norms."""
    delta = {name: other[name] - t for name, t in one.items()}
    return max(relative_distance(as_rows(delta), as_rows(own)) for own in (one, other))


def as_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor flat, as the only row of it: a trunk's have no rows in common."""
    return {name: t.reshape(1, -1) for name, t in tensors.items()}


def schema_of(manifest: Manifest, block_id: BlockId) -> tuple[TensorSchema, ...]:
    """What a download of a block must hold."""
    return schema(block_state(new_block(manifest, block_id, torch.device("cpu"))))


def exchange_config(manifest: Manifest) -> ExchangeConfig:
    """Of a node that only downloads."""
    return ExchangeConfig(
        run_id=manifest.run_id,
        peer_id="",
        codec=manifest.averaging.codec,
        dtype=manifest.dtype,
        limits=partial(GossipLimits.from_manifest, manifest),
    )
