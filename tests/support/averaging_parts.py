"""Averaging without a host: replicas in memory, a cable between two sides that tests can cut, and nodes over real gRPC.

Shapes: R rows, D and H the two dimensions of a weight.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import torch

from common.errors import KilohiveError, UnavailableError
from node.averaging.client import AveragingClient
from node.averaging.exchange import ExchangeConfig, ExchangeResult
from node.averaging.gossip import GossipLimits
from node.averaging.pairing import Pairing, Tally, receive_offer
from node.averaging.replica_set import ReplicaSet
from node.averaging.service import AveragingService
from node.model.replica_state import ReplicaState
from node.rpc.message_stream import Wire
from protocol import averaging_pb2 as pb
from protocol.endpoints import Address
from protocol.manifest import BlockId
from tests.support.swarm_parts import PLAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from node.limits.rate_limits import RateLimits

R = TypeVar("R")

RUN_ID = "run"
BLOCK = BlockId(0, 0)
N_ROWS = 3
SHAPES = {"w_in": (8, 6), "w_out": (6, 8)}
LIMITS = GossipLimits(clip_radius=10.0, max_second=1.0, first_bound=3.0)


class MemoryReplica:
    """A replica that its test trains by hand. In an exchange it is called for its schema (once), a copy, the move.

    `before_call` sees the number of each call, from 1, before it is carried out; calls from number `hold_from` on wait
    for `release`, and set `holds`.
    """

    def __init__(self, state: ReplicaState, block_id: BlockId = BLOCK) -> None:
        self.id = block_id
        self.state = state
        self.calls = 0
        self.before_call: Callable[[int], None] = lambda number: None
        self.hold_from: int | None = None
        self.holds = asyncio.Event()
        self._held: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        return self.state.version

    def call(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        future: Future[R] = Future()
        self.calls += 1
        if self.hold_from is not None and self.calls >= self.hold_from:
            self._held.append(lambda: self._carry_out(function, future))
            self.holds.set()
            return future
        try:
            self.before_call(self.calls)
        except KilohiveError as error:
            future.set_exception(error)
            return future
        self._carry_out(function, future)
        return future

    look = call

    def _carry_out(self, function: Callable[[ReplicaState], R], future: Future[R]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            with self._lock:
                future.set_result(function(self.state))
        except KilohiveError as error:
            future.set_exception(error)

    def release(self) -> None:
        """Carry out what waits, unless its caller has given up, and hold no more."""
        self.hold_from = None
        held, self._held = self._held, []
        for carry_out in held:
            carry_out()

    def train(self, step: float, n_tokens: int = 10) -> None:
        """A step that adds the same to every weight, as if it had learnt from `n_tokens` in each row."""
        with self._lock:
            for p in self.state.params.values():
                p.add_(step)
            self.state.learnt_R += n_tokens
            self.state.steps_R += 1
            self.state.version += 1

    def params(self) -> dict[str, torch.Tensor]:
        return {name: p.clone() for name, p in self.state.params.items()}

    def raw(self) -> bytes:
        """Everything that an exchange may move, as bytes."""
        tensors = [*self.state.named().values(), self.state.steps_R]
        return b"".join(t.contiguous().numpy().tobytes() for t in tensors) + str(self.state.version).encode()


def make_state(
    seed: int = 0,
    *,
    base: ReplicaState | None = None,
    noise: float = 0.05,
    learnt: float = 100.0,
    dtype: torch.dtype = torch.float32,
) -> ReplicaState:
    """Random weights and honest moments; with `base`, weights that differ from its by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    params, first, second = {}, {}, {}
    for name, shape in SHAPES.items():
        drawn = torch.randn(N_ROWS, *shape, generator=generator, dtype=dtype)
        params[name] = drawn if base is None else base.params[name] + noise * drawn
        second[name] = torch.rand(N_ROWS, *shape, generator=generator, dtype=dtype) * 0.1
        first[name] = second[name].sqrt() * 0.5
    return ReplicaState(
        params=params,
        first=first,
        second=second,
        steps_R=torch.full((N_ROWS,), 5 + seed, dtype=torch.int64),
        learnt_R=torch.full((N_ROWS,), learnt, dtype=torch.float64),
        version=5 + seed,
    )


def two_replicas(block_id: BlockId = BLOCK, **changes: Any) -> tuple[MemoryReplica, MemoryReplica]:
    """Replicas of one block that have trained apart a little."""
    one = make_state(1, dtype=changes.get("dtype", torch.float32))
    return MemoryReplica(one, block_id), MemoryReplica(make_state(2, base=one, **changes), block_id)


def distance(one: MemoryReplica, other: MemoryReplica) -> float:
    """L2 distance of the weights, relative to the first's."""
    between = sum(float((p - other.state.params[name]).square().sum()) for name, p in one.state.params.items())
    norm = sum(float(p.square().sum()) for p in one.state.params.values())
    return float((between / norm) ** 0.5)


def exchange_config(peer_id: str, **changes: Any) -> ExchangeConfig:
    config = ExchangeConfig(run_id=RUN_ID, peer_id=peer_id, codec="fp32", dtype="fp32", limits=lambda _: LIMITS)
    return replace(config, **changes)


def replica_set(*replicas: MemoryReplica) -> ReplicaSet:
    held = ReplicaSet()
    for replica in replicas:
        held.add(replica)
    return held


async def unchanged(sender: str, number: int, raw: bytes) -> Sequence[bytes]:
    return (raw,)


class Cable:
    """Two streams joined end to end, each direction holding `capacity` messages.

    `hook` sees every message before it is put in: who sends it ("dialler" or "answerer"), its number among all of the
    cable's, its bytes; it returns what is put in instead.
    """

    def __init__(
        self, hook: Callable[[str, int, bytes], Awaitable[Sequence[bytes]]] = unchanged, capacity: int = 1
    ) -> None:
        self.hook, self._capacity = hook, capacity
        self._lanes: dict[str, deque[bytes]] = {"dialler": deque(), "answerer": deque()}
        self._closed: set[str] = set()
        self._is_cut = False
        self._changed = asyncio.Condition()
        self.n_messages = 0

    async def put(self, sender: str, raw: bytes) -> None:
        number, self.n_messages = self.n_messages, self.n_messages + 1
        for message in await self.hook(sender, number, raw):
            async with self._changed:
                await self._changed.wait_for(lambda: self._is_cut or len(self._lanes[sender]) < self._capacity)
                self._check()
                self._lanes[sender].append(message)
                self._changed.notify_all()

    async def take(self, sender: str) -> bytes | None:
        async with self._changed:
            lane = self._lanes[sender]
            await self._changed.wait_for(lambda: self._is_cut or lane or sender in self._closed)
            self._check()
            self._changed.notify_all()
            return lane.popleft() if lane else None

    async def close(self, sender: str) -> None:
        async with self._changed:
            self._closed.add(sender)
            self._changed.notify_all()

    async def cut(self) -> None:
        async with self._changed:
            self._is_cut = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._is_cut:
            raise UnavailableError("the cable is cut")


@dataclass
class CableEnd:
    cable: Cable
    own: str
    other: str

    async def send(self, raw: bytes) -> None:
        await self.cable.put(self.own, raw)

    async def receive(self) -> bytes | None:
        return await self.cable.take(self.other)


@dataclass(frozen=True)
class Outcome:
    """What each side of an exchange in memory saw; an error is the one it raised."""

    dialled: Tally
    answered: Tally
    dial_error: KilohiveError | None
    answer_error: KilohiveError | None


async def exchange_in_memory(
    dialler: tuple[ReplicaSet, ExchangeConfig],
    answerer: tuple[ReplicaSet, ExchangeConfig],
    block_ids: Sequence[BlockId] = (BLOCK,),
    cable: Cable | None = None,
) -> Outcome:
    """One exchange over a cable; whichever side fails cuts it."""
    cable = cable or Cable()
    dialled = Tally(partner=answerer[1].peer_id, dialled=True)
    answered = Tally(partner="", dialled=False)
    near = Wire(CableEnd(cable, "dialler", "answerer"), dialler[1].silence_s)
    far = Wire(CableEnd(cable, "answerer", "dialler"), answerer[1].silence_s)
    dial = Pairing(near, *dialler, dialled).dial(block_ids)
    answer = _answer(far, answerer, answered)
    errors = await asyncio.gather(_run(dial, cable, "dialler"), _run(answer, cable, "answerer"))
    return Outcome(dialled, answered, *errors)


async def _answer(wire: Wire, answerer: tuple[ReplicaSet, ExchangeConfig], tally: Tally) -> None:
    raw_offer = await receive_offer(wire, answerer[1])
    if raw_offer is not None:
        await Pairing(wire, *answerer, tally).answer(raw_offer)


async def _run(side: Awaitable[None], cable: Cable, name: str) -> KilohiveError | None:
    try:
        await side
    except KilohiveError as error:
        await cable.cut()
        return error
    await cable.close(name)
    return None


@dataclass
class AveragingNode:
    """One node's averaging behind a real gRPC server; `results` are of the exchanges that it answered."""

    peer_id: str
    replicas: ReplicaSet
    service: AveragingService
    client: AveragingClient
    server: grpc.aio.Server
    endpoint: str
    results: asyncio.Queue[ExchangeResult]

    @property
    def address(self) -> Address:
        return Address(self.peer_id, self.endpoint)

    async def exchange_with(
        self, other: AveragingNode, block_ids: Sequence[BlockId] = (BLOCK,), timeout_s: float = 20.0
    ) -> ExchangeResult:
        return await self.client.exchange(other.address, block_ids, timeout_s)


@asynccontextmanager
async def averaging_node(
    peer_id: str,
    *replicas: MemoryReplica,
    stored: Callable[[BlockId], ReplicaState | None] | None = None,
    rate_limits: RateLimits | None = None,
    **changes: Any,
) -> AsyncIterator[AveragingNode]:
    """A node on a free port of this machine."""
    held, config = replica_set(*replicas), exchange_config(peer_id, **changes)
    results: asyncio.Queue[ExchangeResult] = asyncio.Queue()
    service = AveragingService(held, config, results.put_nowait, stored=stored, rate_limits=rate_limits)
    client = AveragingClient(held, config, PLAIN.caller(), rate_limits)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield AveragingNode(peer_id, held, service, client, server, f"127.0.0.1:{port}", results)
    finally:
        await client.close()
        await server.stop(0)


def changed(raw: bytes, change: Callable[[pb.ExchangeMessage], object]) -> bytes:
    """The message with something else in it."""
    message = pb.ExchangeMessage.FromString(raw)
    change(message)
    return message.SerializeToString()
