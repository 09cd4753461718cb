"""Downloads over real gRPC, and the joiner that compares what it gets with a second replica."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch

from common.errors import (
    DeadlineError,
    InvalidInputError,
    LimitExceededError,
    NotHostedError,
    UnavailableError,
    UnknownRunError,
)
from dht.view import Replica
from node.averaging import pieces
from node.averaging.joining import JoinConfig, Origin, choose_source, fetch_replica
from node.averaging.pieces import cut, piece_message
from node.averaging.service import SERVICE_NAME
from node.model.replica_state import ReplicaState, schema
from protocol import averaging_pb2 as pb
from protocol.endpoints import Address
from protocol.manifest import TRUNK, BlockId
from tests.support.averaging_parts import (
    BLOCK,
    N_ROWS,
    RUN_ID,
    AveragingNode,
    MemoryReplica,
    averaging_node,
    make_state,
)
from tests.support.channels import plain_aio_channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

WAIT_S = 20.0
WANTED = schema(make_state())
JOIN = JoinConfig(max_distance=0.5, timeout_s=WAIT_S)


def raw(state: ReplicaState) -> bytes:
    return MemoryReplica(state).raw()


@pytest.mark.parametrize("block_id", [BLOCK, TRUNK])
async def test_a_downloaded_replica_is_equal_to_the_bit(block_id: BlockId, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 512)
    replica, told = MemoryReplica(make_state(), block_id), list[int]()
    async with averaging_node("a", replica, codec="int8") as node, averaging_node("b") as joiner:
        got = await joiner.client.download(node.address, block_id, WANTED, WAIT_S, tell=told.append)
    assert raw(got) == replica.raw()
    assert torch.equal(got.learnt_R, torch.zeros(N_ROWS, dtype=torch.float64))
    assert len(told) == len(cut(WANTED)) > 6
    assert told == sorted(told)
    assert told[-1] == joiner.client.wire_bytes


async def test_weights_alone_come_without_moments() -> None:
    state = make_state()
    async with averaging_node("a", MemoryReplica(state)) as node, averaging_node("b") as joiner:
        got = await joiner.client.download(node.address, BLOCK, WANTED, WAIT_S, params_only=True)
    assert got.first == got.second == {}
    assert all(torch.equal(got.params[name], p) for name, p in state.params.items())


async def test_a_run_in_float64_is_downloaded_whole() -> None:
    state = make_state(dtype=torch.float64)
    async with (
        averaging_node("a", MemoryReplica(state), dtype="fp64") as node,
        averaging_node("b", dtype="fp64") as joiner,
    ):
        got = await joiner.client.download(node.address, BLOCK, schema(state), WAIT_S)
    assert raw(got) == raw(state)


async def test_a_checkpoint_of_a_block_that_is_not_held_is_downloaded_too() -> None:
    checkpoint, asked = make_state(4), list[BlockId]()

    def stored(block_id: BlockId) -> ReplicaState | None:
        asked.append(block_id)
        return checkpoint if block_id == BLOCK else None

    async with averaging_node("a", stored=stored) as node, averaging_node("b") as joiner:
        assert raw(await joiner.client.download(node.address, BLOCK, WANTED, WAIT_S)) == raw(checkpoint)
        with pytest.raises(NotHostedError, match="block: 1/1 is neither hosted nor stored here"):
            await joiner.client.download(node.address, BlockId(1, 1), WANTED, WAIT_S)
    assert asked == [BLOCK, BlockId(1, 1)]


async def test_another_run_or_no_block_is_refused() -> None:
    async with averaging_node("a", MemoryReplica(make_state())) as node:
        async with averaging_node("b", run_id="other") as joiner:
            with pytest.raises(UnknownRunError):
                await joiner.client.download(node.address, BLOCK, WANTED, WAIT_S)
        for request, field in (
            (pb.DownloadRequest(run_id=RUN_ID, block="../etc").SerializeToString(), "block"),
            (b"\xff", "message"),
        ):
            async with plain_aio_channel(node.endpoint) as channel:
                method: Any = channel.unary_stream(f"/{SERVICE_NAME}/Download")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await method(request, timeout=WAIT_S).read()
                assert dict(caught.value.trailing_metadata() or ())["kilohive-field"] == field


async def test_a_third_download_waits_for_its_turn() -> None:
    replica = MemoryReplica(make_state())
    replica.hold_from, both = 1, asyncio.Event()
    real = replica.look

    def count(function: Any) -> Any:
        future = real(function)
        if replica.calls == 2:
            both.set()
        return future

    replica.look = count  # type: ignore[method-assign]
    async with averaging_node("a", replica) as node, averaging_node("b") as joiner:
        ask = joiner.client.download
        tasks = [asyncio.create_task(ask(node.address, BLOCK, WANTED, WAIT_S)) for _ in range(2)]
        await asyncio.wait_for(both.wait(), WAIT_S)
        with pytest.raises(DeadlineError):
            await ask(node.address, BLOCK, WANTED, 0.5)
        third = asyncio.create_task(ask(node.address, BLOCK, WANTED, WAIT_S))
        assert replica.calls == 2
        replica.release()
        for got in await asyncio.gather(*tasks, third):
            assert raw(got) == replica.raw()


class Liar:
    """A server whose Download sends what its test says."""

    def __init__(self, messages: Sequence[pb.ExchangeMessage | bytes], *, hang: bool = False) -> None:
        self._messages, self._hang = messages, hang
        self.started = asyncio.Event()

    async def download(self, _: bytes, context: Any) -> None:
        for message in self._messages:
            await context.write(message if isinstance(message, bytes) else message.SerializeToString())
        self.started.set()
        if self._hang:
            await asyncio.Event().wait()

    async def __aenter__(self) -> str:
        self._server = grpc.aio.server()
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {"Download": grpc.unary_stream_rpc_method_handler(self.download)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)


def messages(state: ReplicaState, **changes: Any) -> list[pb.ExchangeMessage | bytes]:
    fields = {"block": "0/0", "version": state.version, "steps": state.steps_R.tolist()}
    flat = {name: t.reshape(-1) for name, t in state.named().items()}
    return [
        pb.ExchangeMessage(start=pb.Start(**{**fields, **changes})),
        *(piece_message(s, s.of(flat), "fp32") for s in cut(schema(state))),
    ]


def with_second(value: float) -> ReplicaState:
    state = make_state()
    state.second["w_out"].fill_(value)
    return state


BAD: dict[str, tuple[Callable[[], list[pb.ExchangeMessage | bytes]], type[Exception], str]] = {
    "another block": (lambda: messages(make_state(), block="1/1"), InvalidInputError, "block: is '1/1'"),
    "steps of too few rows": (lambda: messages(make_state(), steps=[1]), InvalidInputError, "steps: has 1 values"),
    "a version beyond any run": (
        lambda: messages(make_state(), version=2**63),
        LimitExceededError,
        "version and steps",
    ),
    "too few pieces": (lambda: messages(make_state())[:-1], InvalidInputError, "5 of block 0/0 came, must be 6"),
    "too many pieces": (
        lambda: [*messages(make_state()), messages(make_state())[1]],
        InvalidInputError,
        "no more pieces are due",
    ),
    "a piece left out": (
        lambda: [m for n, m in enumerate(messages(make_state())) if n != 2],
        InvalidInputError,
        r"is 'params.w_in', must be 'first.w_out'",
    ),
    "garbage": (lambda: [messages(make_state())[0], b"\xff\xff"], InvalidInputError, "not a whole"),
    "nothing": (list, UnavailableError, "closed the stream"),
    "negative squares": (lambda: messages(with_second(-1.0)), InvalidInputError, r"second\.w_out"),
    "squares over the limit": (lambda: messages(with_second(2.0)), LimitExceededError, r"second\.w_out"),
    "not finite": (lambda: messages(with_second(float("nan"))), InvalidInputError, r"second\.w_out: holds NaN"),
}


@pytest.mark.parametrize("name", list(BAD))
async def test_a_download_that_does_not_fit_is_refused_by_field(name: str) -> None:
    build, error, problem = BAD[name]
    async with Liar(build()) as endpoint, averaging_node("b") as joiner:
        with pytest.raises(error, match=problem):
            await joiner.client.download(Address("peer-x", endpoint), BLOCK, WANTED, WAIT_S)


async def test_a_download_cut_in_the_middle_harms_nobody() -> None:
    replica, liar = MemoryReplica(make_state()), Liar(messages(make_state())[:3], hang=True)
    before = replica.raw()
    async with averaging_node("a", replica) as node, averaging_node("b") as joiner:
        async with liar as endpoint:
            cut_off = asyncio.create_task(joiner.client.download(Address("peer-x", endpoint), BLOCK, WANTED, WAIT_S))
            await asyncio.wait_for(liar.started.wait(), WAIT_S)
        with pytest.raises(UnavailableError):
            await cut_off

        def leave(n_bytes: int) -> None:
            leaving.cancel()

        leaving = asyncio.create_task(joiner.client.download(node.address, BLOCK, WANTED, WAIT_S, tell=leave))
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert replica.raw() == before
        assert raw(await joiner.client.download(node.address, BLOCK, WANTED, WAIT_S)) == before


def replica_at(node: AveragingNode | str, version: int, peer_id: str = "") -> Replica:
    return Replica(
        block=BLOCK,
        peer_id=peer_id or (node if isinstance(node, str) else node.peer_id),
        endpoint=node if isinstance(node, str) else node.endpoint,
        version=version,
        queue_tokens=0,
        tokens_per_s=0.0,
        tokens_total=0,
        n_experts=N_ROWS,
        expiration_s=2e9,
    )


class Swarm:
    """Nodes with one replica each, of the versions and states that a test names."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.replicas: list[Replica] = []

    async def add(self, state: ReplicaState, version: int) -> None:
        node = await self.stack.enter_async_context(averaging_node(f"peer-{version}", MemoryReplica(state)))
        self.replicas.append(replica_at(node, version))

    async def fetch(self, config: JoinConfig = JOIN) -> ReplicaState:
        joiner = await self.stack.enter_async_context(averaging_node("joiner"))
        return await fetch_replica(joiner.client, self.replicas, WANTED, config, random.Random(0))


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    swarm = Swarm()
    async with swarm.stack:
        yield swarm


HONEST = make_state(1)
FORGED = make_state(2)


def near(seed: int) -> ReplicaState:
    return make_state(seed, base=HONEST)


async def test_a_joiner_takes_the_newest_of_two_that_agree(swarm: Swarm) -> None:
    await swarm.add(HONEST, 3)
    await swarm.add(near(7), 8)
    assert raw(await swarm.fetch()) == raw(near(7))


async def test_a_joiner_passes_over_a_newest_replica_that_nobody_bears_out(swarm: Swarm) -> None:
    await swarm.add(HONEST, 3)
    await swarm.add(near(7), 8)
    await swarm.add(FORGED, 9)
    assert raw(await swarm.fetch()) == raw(near(7))


async def test_a_replica_of_huge_weights_agrees_with_nobody(swarm: Swarm) -> None:
    huge = make_state(1)
    for p in huge.params.values():
        p.mul_(1e6)
    await swarm.add(HONEST, 3)
    await swarm.add(huge, 9)
    with pytest.raises(UnavailableError, match="no two of 2 replicas' weights are within 5 of each other"):
        await swarm.fetch(JoinConfig(max_distance=5.0, timeout_s=WAIT_S))


async def test_a_joiner_takes_nothing_where_nobody_agrees(swarm: Swarm) -> None:
    await swarm.add(HONEST, 3)
    await swarm.add(FORGED, 9)
    with pytest.raises(UnavailableError, match=r"block 0/0: no two of 2 replicas' weights are within 0\.5"):
        await swarm.fetch()


async def test_a_lone_replica_is_believed(swarm: Swarm) -> None:
    await swarm.add(HONEST, 3)
    assert raw(await swarm.fetch()) == raw(HONEST)


async def test_sources_that_fail_or_send_bad_bytes_are_passed_over(swarm: Swarm) -> None:
    await swarm.add(HONEST, 3)
    await swarm.add(near(7), 4)
    liar = await swarm.stack.enter_async_context(Liar(messages(with_second(-1.0))))
    swarm.replicas += [replica_at(liar, 9, "liar"), replica_at("127.0.0.1:1", 10, "gone")]
    assert raw(await swarm.fetch()) == raw(near(7))


async def test_a_source_that_sends_something_else_when_asked_again_is_not_believed(swarm: Swarm) -> None:
    """The newest disagrees with both others, so the second is asked again, whole."""
    await swarm.add(HONEST, 3)
    await swarm.add(FORGED, 9)
    two_faced = MemoryReplica(near(7))
    node = await swarm.stack.enter_async_context(averaging_node("two-faced", two_faced))
    swarm.replicas.append(replica_at(node, 8))

    def turn(number: int) -> None:
        if number == 2:
            two_faced.state = make_state(5)

    two_faced.before_call = turn
    with pytest.raises(UnavailableError, match="no two of 3"):
        await swarm.fetch()


async def test_none_to_download_from_is_unavailable(swarm: Swarm) -> None:
    with pytest.raises(UnavailableError, match="no replica is there"):
        await swarm.fetch()
    swarm.replicas.append(replica_at("127.0.0.1:1", 1, "gone"))
    with pytest.raises(UnavailableError, match="block 0/0: none of 1 replicas could be downloaded"):
        await swarm.fetch()


async def test_only_so_many_sources_are_asked(swarm: Swarm) -> None:
    for version in range(5):
        await swarm.add(make_state(version), version)
    with pytest.raises(UnavailableError, match="no two of 3"):
        await swarm.fetch(JoinConfig(max_distance=0.5, timeout_s=WAIT_S, max_sources=3))


def test_a_joiner_prefers_live_replicas_then_the_newest_checkpoint_then_the_seed() -> None:
    live, stored = [replica_at("a:1", 5), replica_at("b:1", 7)], [replica_at("c:1", 9), replica_at("d:1", 12)]
    chosen = choose_source(live, stored, own_version=100)
    assert (chosen.origin, [r.version for r in chosen.candidates]) == (Origin.REPLICAS, [7, 5])
    chosen = choose_source([], stored, own_version=11)
    assert (chosen.origin, [r.version for r in chosen.candidates]) == (Origin.STORED, [12, 9])
    assert choose_source([], stored, own_version=12).origin is Origin.OWN_CHECKPOINT
    assert choose_source([], [], own_version=0).origin is Origin.OWN_CHECKPOINT
    assert choose_source([], stored, own_version=None).origin is Origin.STORED
    assert choose_source([], [], own_version=None).origin is Origin.SEED
