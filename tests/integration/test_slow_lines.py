"""Downloads and exchanges over lines that are slow, and downloads that break off, over real gRPC."""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch

from node.averaging.joining import JoinConfig, fetch_replica
from node.averaging.partial import PartialDownloads
from node.averaging.pieces import cut, piece_message
from node.averaging.service import MAX_DOWNLOADS, SERVICE_NAME
from node.limits.limits import Limits
from node.limits.rate_limits import RateLimits
from node.model.replica_state import ReplicaState, schema
from protocol import averaging_pb2 as pb
from protocol.endpoints import Address
from tests.integration.test_download import replica_at
from tests.support import averaging_parts
from tests.support.averaging_parts import BLOCK, RUN_ID, MemoryReplica, averaging_node, make_state
from tests.support.channels import plain_aio_channel

if TYPE_CHECKING:
    from dht.view import Replica

WAIT_S = 30.0
SILENCE_S = 0.8
RATE = 2_000_000
"""Bytes a second: a piece takes most of SILENCE_S, and the window of a gRPC stream several times that."""

LARGE = {"w_in": (256, 512), "w_out": (512, 256)}
JOIN = JoinConfig(max_distance=0.5, timeout_s=WAIT_S)
HONEST = make_state(1)
FORGED = make_state(2)


def near(seed: int) -> ReplicaState:
    return make_state(seed, base=HONEST)


def raw(state: ReplicaState) -> bytes:
    return MemoryReplica(state).raw()


@pytest.mark.parametrize("slow", ["joiner", "sender"])
async def test_a_download_takes_as_long_as_the_owners_rate_asks_for(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging_parts, "SHAPES", LARGE)
    state = make_state()
    limited, free = RateLimits(Limits(down_bytes_per_s=RATE, up_bytes_per_s=RATE)), RateLimits()
    n_bytes = sum(t.nbytes for t in state.named().values())
    begun_s = time.monotonic()
    async with (
        averaging_node(
            "a", MemoryReplica(state), rate_limits=free if slow == "joiner" else limited, silence_s=SILENCE_S
        ) as node,
        averaging_node("b", rate_limits=limited if slow == "joiner" else free, silence_s=SILENCE_S) as joiner,
    ):
        # The limit of time is for all but the bytes.
        got = await joiner.client.download(node.address, BLOCK, schema(state), 1.0)
    assert raw(got) == raw(state)
    assert time.monotonic() - begun_s > n_bytes / RATE - 1.0


@pytest.mark.parametrize("slow", ["dialler", "answerer"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
async def test_an_exchange_takes_as_long_as_the_owners_rate_asks_for(
    codec: str, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging_parts, "SHAPES", LARGE)
    one = make_state(1)
    limited, free = RateLimits(Limits(down_bytes_per_s=RATE)), RateLimits()
    a, b = MemoryReplica(one), MemoryReplica(make_state(2, base=one))
    async with (
        averaging_node(
            "a", a, rate_limits=limited if slow == "dialler" else free, codec=codec, silence_s=SILENCE_S
        ) as dialler,
        averaging_node(
            "b", b, rate_limits=limited if slow == "answerer" else free, codec=codec, silence_s=SILENCE_S
        ) as answerer,
    ):
        result = await dialler.exchange_with(answerer, timeout_s=WAIT_S)
    assert (result.problem, [m.block for m in result.blocks]) == ("", [BLOCK])


@pytest.mark.parametrize("told", ["nothing", "that it sends no more"])
async def test_a_joiner_that_freezes_costs_the_sender_only_silence(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging_parts, "SHAPES", LARGE)
    state = make_state()
    request = pb.DownloadRequest(run_id=RUN_ID, block=str(BLOCK)).SerializeToString()
    async with (
        averaging_node("a", MemoryReplica(state), silence_s=SILENCE_S) as node,
        averaging_node("b") as joiner,
        plain_aio_channel(node.endpoint) as channel,
    ):
        for _ in range(MAX_DOWNLOADS):
            call: Any = channel.stream_stream(f"/{SERVICE_NAME}/Download")()
            await call.write(request)
            if told != "nothing":
                await call.done_writing()
        assert raw(await joiner.client.download(node.address, BLOCK, schema(state), WAIT_S)) == raw(state)


class Breaking:
    """A replica's holder whose first download breaks off after `n_pieces`; `asked` are the first pieces asked for."""

    def __init__(self, state: ReplicaState, n_pieces: int, *, old: bool = False, for_ever: bool = False) -> None:
        self._state, self._n_pieces, self._old, self._for_ever = state, n_pieces, old, for_ever
        self.asked: list[tuple[int, bool]] = []

    async def _download(self, raw_request: bytes, context: Any) -> None:
        request = pb.DownloadRequest.FromString(raw_request)
        self.asked.append((request.first_piece, request.params_only))
        state, first = self._state, 0 if self._old else request.first_piece
        flat = {name: t.reshape(-1) for name, t in state.named().items()}
        slots = [s for s in cut(schema(state)) if s.is_weights or not request.params_only]
        start = pb.Start(block=str(BLOCK), version=state.version, steps=state.steps_R.tolist(), first_piece=first)
        await context.write(pb.ExchangeMessage(start=start).SerializeToString())
        breaks = self._for_ever or len(self.asked) == 1
        for slot in slots[first : self._n_pieces if breaks else None]:
            await context.write(piece_message(slot, slot.of(flat), "fp32").SerializeToString())
        if breaks:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the line is cut")

    async def __aenter__(self) -> Replica:
        self._server = grpc.aio.server()
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {"Download": grpc.unary_stream_rpc_method_handler(self._download)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return replica_at(f"127.0.0.1:{port}", 99, "breaking")

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)


async def fetch(*replicas: Replica, partials: PartialDownloads | None = None) -> ReplicaState:
    async with averaging_node("joiner") as joiner:
        return await fetch_replica(joiner.client, replicas, schema(HONEST), JOIN, random.Random(0), partials)


def parts_of(state: ReplicaState, *others: ReplicaState) -> list[int]:
    """For each tensor but the first moments, which may be cut to their bound, which of `others` it is equal to."""
    return [
        next(n for n, other in enumerate(others) if torch.equal(tensor, other.named()[name]))
        for name, tensor in state.named().items()
        if not name.startswith("first.")
    ]


@pytest.mark.parametrize("old", [False, True])
async def test_a_download_goes_on_where_it_broke_off(old: bool) -> None:
    breaking = Breaking(HONEST, 4, old=old)
    async with breaking as replica:
        assert raw(await fetch(replica)) == raw(HONEST)
    assert breaking.asked == [(0, False), (4, False)]


async def test_another_replica_sends_the_rest_and_a_third_bears_it_out() -> None:
    breaking = Breaking(near(5), 4, for_ever=True)
    async with (
        breaking as first,
        averaging_node("second", MemoryReplica(near(7))) as second,
        averaging_node("third", MemoryReplica(HONEST)) as third,
    ):
        got = await fetch(first, replica_at(second, 8), replica_at(third, 7))
    # Sorted by name: first moments and weights are of the one, second moments of the other.
    assert parts_of(got, near(5), near(7)) == [0, 0, 1, 1]
    assert (got.version, got.steps_R.tolist()) == (near(7).version, near(7).steps_R.tolist())


async def test_a_forged_beginning_is_not_believed_where_nobody_else_bears_it_out() -> None:
    async with (
        Breaking(FORGED, 4, for_ever=True) as first,
        averaging_node("second", MemoryReplica(HONEST)) as second,
    ):
        assert raw(await fetch(first, replica_at(second, 8))) == raw(HONEST)


async def test_what_came_of_a_broken_download_is_there_at_the_next_try() -> None:
    breaking, partials = Breaking(HONEST, 4), PartialDownloads()
    partial = partials.anew(BLOCK, schema(HONEST))
    async with breaking as replica, averaging_node("joiner") as joiner:
        with pytest.raises(Exception, match="the line is cut"):
            await joiner.client.download(Address("breaking", replica.endpoint), BLOCK, partial, WAIT_S)
        partials.keep(partial)
        assert raw(await fetch(replica, partials=partials)) == raw(HONEST)
    assert breaking.asked == [(0, False), (4, False)]


async def test_a_first_piece_beyond_the_last_is_refused() -> None:
    request = pb.DownloadRequest(run_id=RUN_ID, block=str(BLOCK), first_piece=len(cut(schema(HONEST))) + 1)
    async with averaging_node("a", MemoryReplica(HONEST)) as node, plain_aio_channel(node.endpoint) as channel:
        method: Any = channel.unary_stream(f"/{SERVICE_NAME}/Download")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request.SerializeToString(), timeout=WAIT_S).read()
    assert dict(caught.value.trailing_metadata() or ())["kilohive-field"] == "first_piece"


@pytest.mark.parametrize("slow", ["dialler", "answerer"])
async def test_a_block_that_would_take_too_long_is_left_out_in_a_sentence(slow: str) -> None:
    a, b = MemoryReplica(make_state(1)), MemoryReplica(near(2))
    before = a.raw(), b.raw()
    limits = {"dialler": math.inf, "answerer": math.inf, slow: 1000}
    async with (
        averaging_node("a", a, max_block_bytes=limits["dialler"]) as dialler,
        averaging_node("b", b, max_block_bytes=limits["answerer"]) as answerer,
    ):
        result = await dialler.exchange_with(answerer)
    why = {
        "dialler": "too slow at the rate that this node's owner allows",
        "answerer": "too slow at the rate that its owner allows there",
    }
    assert (result.problem, result.blocks, result.refused) == ("", (), {BLOCK: why[slow]})
    assert (a.raw(), b.raw()) == before


async def test_an_exchange_may_take_what_its_largest_block_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging_parts, "SHAPES", LARGE)
    one = make_state(1)
    a, b = MemoryReplica(one), MemoryReplica(make_state(2, base=one))
    limited = RateLimits(Limits(down_bytes_per_s=RATE))
    async with averaging_node("a", a, rate_limits=limited) as dialler, averaging_node("b", b) as answerer:
        result = await dialler.exchange_with(answerer, timeout_s=1.0)
    assert (result.problem, [m.block for m in result.blocks]) == ("", [BLOCK])
