"""An averager among fakes: the client is one, time the test's, the directory whoever the test lists."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.events import EventLog
from dht.view import Replica
from node.averaging.averager import Averager, AveragerConfig
from node.averaging.exchange import BlockResult, ExchangeResult
from protocol.manifest import BlockId
from tests.support.events import written_to

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from node.model.replica_state import ReplicaState
    from protocol.endpoints import Address

A, B = BlockId(0, 0), BlockId(0, 1)


@dataclass
class FakeReplica:
    id: BlockId
    version: int = 0

    def call(self, function: Callable[[ReplicaState], Any]) -> Future[Any]:
        raise AssertionError("the averager touches no tensors")

    look = call


@dataclass
class FakeReplicas:
    held: dict[BlockId, FakeReplica]

    def ids(self) -> tuple[BlockId, ...]:
        return tuple(self.held)

    def get(self, block_id: BlockId) -> FakeReplica | None:
        return self.held.get(block_id)


@dataclass
class FakeDirectory:
    """Whoever the test lists; it has no way to be told of failures."""

    listed: list[Replica] = field(default_factory=list)

    def replicas(self, block: BlockId) -> list[Replica]:
        return [replica for replica in self.listed if replica.block == block]


class FakeClient:
    """Answers with the next of `script` (an error is raised), else moves every block, or none with a `refuser`."""

    def __init__(self) -> None:
        self.script: deque[ExchangeResult | Exception] = deque()
        self.refuser = ""
        self.calls: list[tuple[str, str, tuple[BlockId, ...], float]] = []
        self.called = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0
        self.cancelled = 0

    async def exchange(self, partner: Address, block_ids: Sequence[BlockId], timeout_s: float) -> ExchangeResult:
        self.under_way += 1
        assert self.under_way == 1
        self.calls.append((partner.endpoint, partner.peer_id, tuple(block_ids), timeout_s))
        async with self.called:
            self.called.notify_all()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.end()
            raise
        finally:
            self.under_way -= 1
        return self._answer(partner.peer_id, block_ids)

    async def end(self) -> None:
        """What a cancelled exchange still does."""

    def _answer(self, partner_id: str, block_ids: Sequence[BlockId]) -> ExchangeResult:
        if self.script:
            said = self.script.popleft()
            if isinstance(said, Exception):
                raise said
            return said
        if partner_id == self.refuser:
            return result(partner_id, refused=dict.fromkeys(block_ids, "SCHEMA"))
        return result(partner_id, *block_ids)

    async def wait_for_calls(self, n: int) -> None:
        async with asyncio.timeout(30), self.called:
            await self.called.wait_for(lambda: len(self.calls) >= n)


def result(partner: str, *blocks: BlockId, **changes: Any) -> ExchangeResult:
    moved = tuple(
        BlockResult(block=block, divergence=0.25 * (i + 1), clipped_rows=i, version_gap=0, version=0, partner_share=0.5)
        for i, block in enumerate(blocks)
    )
    known: dict[str, Any] = {
        "partner": partner,
        "dialled": True,
        "blocks": moved,
        "refused": {},
        "n_bytes": 1000,
        "seconds": 0.12345,
    }
    return ExchangeResult(**{**known, **changes})


def holder(peer_id: str, *blocks: BlockId) -> list[Replica]:
    return [
        Replica(
            block=block,
            peer_id=peer_id,
            endpoint=f"{peer_id}:4000",
            version=0,
            queue_tokens=0,
            tokens_per_s=0.0,
            tokens_total=0,
            n_experts=4,
            expiration_s=100.0,
        )
        for block in blocks
    ]


class Swarm:
    """An averager among fakes, with its events and its clock, which goes on by `tick_s` whenever it is read."""

    def __init__(self, period_s: float = 1e-3, peer_id: str = "own") -> None:
        self.now_s, self.tick_s = 1000.0, 0.0
        self.client, self.directory = FakeClient(), FakeDirectory(holder("own", A, B))
        self.replicas = FakeReplicas({A: FakeReplica(A), B: FakeReplica(B)})
        self.events: list[dict[str, Any]] = []
        log = EventLog()
        log.subscribe(written_to(self.events))
        config = AveragerConfig(peer_id=peer_id, period_s=period_s, timeout_s=7.0)
        self.averager = Averager(self.replicas, self.client, self.directory, config, log, self.clock)

    def clock(self) -> float:
        self.now_s += self.tick_s
        return self.now_s
