"""Exchanges between two nodes over real gRPC: they meet, they survive each other's death, and hostile bytes."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch

from common.errors import (
    DrainingError,
    OverloadedError,
    UnavailableError,
    UnknownRunError,
)
from node.averaging import pieces
from node.averaging.pieces import cut, piece_message
from node.averaging.service import SERVICE_NAME
from node.limits.limits import Limits
from node.limits.rate_limits import RateLimits
from node.model.replica_state import schema, schema_hash
from protocol import averaging_pb2 as pb
from protocol.call_signature import CallSigner
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.manifest import TRUNK, BlockId
from protocol.tensors import encode
from protocol.version import PROTOCOL_VERSION
from tests.support.averaging_parts import (
    BLOCK,
    N_ROWS,
    RUN_ID,
    AveragingNode,
    MemoryReplica,
    averaging_node,
    distance,
    make_state,
    two_replicas,
)
from tests.support.channels import plain_aio_channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.averaging.exchange import ExchangeResult
    from protocol.manifest import AveragingCodec

WAIT_S = 20.0
COPY, MOVE = 2, 3  # of the calls of a replica
BLOCKS = (BLOCK, BlockId(0, 1), TRUNK)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
async def test_two_nodes_meet_over_grpc(codec: AveragingCodec) -> None:
    pairs = [two_replicas(block_id) for block_id in BLOCKS]
    async with (
        averaging_node("peer-a", *(a for a, _ in pairs), codec=codec) as node_a,
        averaging_node("peer-b", *(b for _, b in pairs), codec=codec) as node_b,
    ):
        result = await node_a.exchange_with(node_b, BLOCKS)
        assert result.problem == ""
        assert [moved.block for moved in result.blocks] == list(BLOCKS)
        assert all(moved.divergence == pytest.approx(0.05, rel=0.3) for moved in result.blocks)
        if codec != "fp32":
            await node_b.exchange_with(node_a, BLOCKS)
        for a, b in pairs:
            assert distance(a, b) < (1e-6 if codec == "fp32" else 1e-3)


async def test_both_nodes_count_the_same_bytes_and_the_answerer_reports_too() -> None:
    a, b = two_replicas()
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        result = await node_a.exchange_with(node_b)
        answered = await answered_by(node_b)
    assert (answered.partner, answered.dialled, answered.problem) == ("peer-a", False, "")
    assert [moved.block for moved in answered.blocks] == [BLOCK]
    n_values = sum(t.numel() for t in a.state.named().values())
    assert answered.n_bytes == result.n_bytes == node_a.client.wire_bytes
    assert 2 * 4 * n_values < result.n_bytes < 2 * 4 * n_values + 4096


async def test_replicas_of_many_pieces_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 256)
    a, b = two_replicas()
    assert len(cut(schema(a.state))) > 16
    async with averaging_node("peer-a", a, codec="int8") as node_a, averaging_node("peer-b", b, codec="int8") as node_b:
        for _ in range(2):
            assert (await node_a.exchange_with(node_b)).problem == ""
    assert distance(a, b) < 1e-3


async def answered_by(node: AveragingNode) -> ExchangeResult:
    """The handler ends a moment after its dialler."""
    return await asyncio.wait_for(node.results.get(), WAIT_S)


@pytest.mark.parametrize("at", [COPY, MOVE])
async def test_a_dialler_that_dies_leaves_the_answerer_whole_and_the_next_exchange_completes(at: int) -> None:
    a, b = two_replicas()
    before = a.raw(), b.raw()
    a.hold_from = at
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        dialling = asyncio.create_task(node_a.exchange_with(node_b))
        await asyncio.wait_for(a.holds.wait(), WAIT_S)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        a.release()
        answered = await answered_by(node_b)
        assert a.raw() == before[0]
        assert (b.raw() != before[1]) == (at == MOVE) == bool(answered.blocks)
        assert [m.block for m in (await node_a.exchange_with(node_b)).blocks] == [BLOCK]


@pytest.mark.parametrize("at", [COPY, MOVE])
async def test_an_answerer_that_dies_leaves_the_dialler_whole_and_the_next_exchange_completes(at: int) -> None:
    a, b = two_replicas()
    before = a.raw(), b.raw()
    b.hold_from = at
    async with averaging_node("peer-a", a) as node_a:
        async with averaging_node("peer-b", b) as node_b:
            dialling = asyncio.create_task(node_a.exchange_with(node_b))
            await asyncio.wait_for(b.holds.wait(), WAIT_S)
            await node_b.server.stop(0)
            result = await asyncio.wait_for(dialling, WAIT_S)
        b.release()
        assert result.problem
        assert result.blocks == ()
        assert (a.raw(), b.raw()) == before
        async with averaging_node("peer-b", b) as node_b:
            assert [m.block for m in (await node_a.exchange_with(node_b)).blocks] == [BLOCK]


async def test_nobody_at_the_endpoint_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with averaging_node("peer-a", two_replicas()[0]) as node_a:
            nobody = Address("peer-b", f"127.0.0.1:{unused.getsockname()[1]}")
            with pytest.raises(UnavailableError):
                await node_a.client.exchange(nobody, [BLOCK], WAIT_S)


async def test_another_run_is_refused_by_type() -> None:
    a, b = two_replicas()
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b, run_id="other") as node_b:
        with pytest.raises(UnknownRunError, match="run_id: is 'run', this node serves 'other'"):
            await node_a.exchange_with(node_b)
        assert node_b.results.empty()


async def test_two_exchanges_at_once_are_one_too_many() -> None:
    a, b = two_replicas()
    b.hold_from = MOVE
    async with (
        averaging_node("peer-a", a) as node_a,
        averaging_node("peer-b", b) as node_b,
        averaging_node("peer-c", MemoryReplica(make_state(9))) as node_c,
    ):
        dialling = asyncio.create_task(node_a.exchange_with(node_b))
        await asyncio.wait_for(b.holds.wait(), WAIT_S)
        with pytest.raises(OverloadedError, match="already has 1 exchange") as caught:
            await node_c.exchange_with(node_b)
        assert caught.value.retry_after_s > 0
        with pytest.raises(OverloadedError, match="this node has begun another exchange"):
            await node_a.exchange_with(node_b)
        b.release()
        assert [m.block for m in (await dialling).blocks] == [BLOCK]
        await answered_by(node_b)
        assert [m.block for m in (await node_c.exchange_with(node_b)).blocks] == [BLOCK]


async def test_a_node_in_debt_to_its_owner_averages_only_once_it_is_paid() -> None:
    a, b = two_replicas()
    rate_limits = RateLimits(Limits(up_bytes_per_s=500_000, down_bytes_per_s=500_000))
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b, rate_limits=rate_limits) as node_b:
        rate_limits.sent(2_000_000)
        with pytest.raises(OverloadedError, match="owner limits it: no exchange for now") as caught:
            await node_a.exchange_with(node_b)
        assert 2.0 < caught.value.retry_after_s < 5.0
        result = await node_b.exchange_with(node_a)  # it waits, and then begins one itself
        assert [m.block for m in result.blocks] == [BLOCK]
        assert rate_limits.owed_s() < 2.0
        assert rate_limits.sent_bytes > 2_000_000


async def test_a_node_that_leaves_says_so() -> None:
    a, b = two_replicas()

    def leaving(number: int) -> None:
        raise DrainingError("this host is leaving")

    b.before_call = leaving
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        with pytest.raises(DrainingError, match="this host is leaving"):
            await node_a.exchange_with(node_b)


async def test_a_peer_that_dials_and_offers_nothing_keeps_nobody_out() -> None:
    a, b = two_replicas()
    async with (
        averaging_node("peer-a", a) as node_a,
        averaging_node("peer-b", b) as node_b,
        plain_aio_channel(node_b.endpoint) as channel,
    ):
        silent: Any = channel.stream_stream(f"/{SERVICE_NAME}/Exchange")(timeout=WAIT_S)
        await silent.wait_for_connection()
        assert [m.block for m in (await node_a.exchange_with(node_b)).blocks] == [BLOCK]
        assert not silent.done()


async def test_a_refusal_waits_for_the_offer_so_that_it_reaches_the_dialler_whole() -> None:
    _, b = two_replicas()
    rate_limits = RateLimits(Limits(up_bytes_per_s=500_000, down_bytes_per_s=500_000))
    rate_limits.sent(2_000_000)
    async with (
        averaging_node("peer-b", b, rate_limits=rate_limits) as node_b,
        plain_aio_channel(node_b.endpoint) as channel,
    ):
        call: Any = channel.stream_stream(f"/{SERVICE_NAME}/Exchange")(timeout=WAIT_S)
        reading = asyncio.create_task(call.read())
        assert not (await asyncio.wait({reading}, timeout=0.5))[0], "refused before there was an offer"
        await call.write(offer().SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError, match="owner limits it"):
            await asyncio.wait_for(reading, WAIT_S)


async def test_a_client_that_is_closed_ends_its_exchange() -> None:
    a, b = two_replicas()
    b.hold_from = MOVE
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        dialling = asyncio.create_task(node_a.exchange_with(node_b))
        await asyncio.wait_for(b.holds.wait(), WAIT_S)
        await node_a.client.close()
        assert (await asyncio.wait_for(dialling, WAIT_S)).problem == "this node closed the call"
        assert (await answered_by(node_b)).problem == "the dialler broke off"


def offer(**changes: Any) -> pb.ExchangeMessage:
    blocks = [pb.BlockOffer(block="0/0", schema=schema_hash(schema(make_state())))]
    fields = {"protocol_version": PROTOCOL_VERSION, "run_id": RUN_ID, "peer_id": "evil", "blocks": blocks}
    return pb.ExchangeMessage(offer=pb.Offer(**{**fields, **changes}))


def start(**changes: Any) -> pb.ExchangeMessage:
    fields = {"block": "0/0", "version": 1, "work": [1.0] * N_ROWS, "steps": [1] * N_ROWS}
    return pb.ExchangeMessage(start=pb.Start(**{**fields, **changes}))


def piece(index: int = 0, values: torch.Tensor | None = None) -> pb.ExchangeMessage:
    slot = cut(schema(make_state()))[index]
    x = torch.zeros(slot.shape) if values is None else values.expand(slot.shape)
    return piece_message(slot, x.reshape(-1), "fp32")


def declared(shape: list[int]) -> pb.ExchangeMessage:
    message = piece()
    message.piece.values.shape[:] = shape
    message.piece.hash = pieces._hash(message.piece)
    return message


def lying_hash() -> pb.ExchangeMessage:
    message = piece()
    message.piece.hash = b"\0" * 16
    return message


def other_codec() -> pb.ExchangeMessage:
    message = piece()
    message.piece.values.CopyFrom(encode(torch.zeros(3, 48), "fp16"))
    return message


N_PIECES = 6  # first.*, params.*, second.*
HOSTILE: dict[str, tuple[Callable[[], list[Any]], grpc.StatusCode, str, str]] = {
    "garbage": (lambda: [b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "message", "not a whole"),
    "another protocol": (
        lambda: [offer(protocol_version=1)],
        grpc.StatusCode.INVALID_ARGUMENT,
        "protocol_version",
        "is 1, this node speaks",
    ),
    "another run": (lambda: [offer(run_id="x")], grpc.StatusCode.NOT_FOUND, "run_id", "this node serves"),
    "a piece without a start": (
        lambda: [offer(), piece()],
        grpc.StatusCode.INVALID_ARGUMENT,
        "message",
        "is piece, must be start",
    ),
    "a block that was not offered": (
        lambda: [offer(), start(block="5/5")],
        grpc.StatusCode.INVALID_ARGUMENT,
        "block",
        "'5/5', which is not among",
    ),
    "endless work": (
        lambda: [offer(), start(work=[float("inf")] * N_ROWS)],
        grpc.StatusCode.INVALID_ARGUMENT,
        "work",
        "must be from 0 to",
    ),
    "a tensor declared at exabytes": (
        lambda: [offer(), start(), declared([2**31, 2**31])],
        grpc.StatusCode.INVALID_ARGUMENT,
        "first.w_in",
        "shape is 2147483648 x 2147483648",
    ),
    "a hash that lies": (
        lambda: [offer(), start(), lying_hash()],
        grpc.StatusCode.INVALID_ARGUMENT,
        "first.w_in hash",
        "does not fit",
    ),
    "a codec that is not the run's": (
        lambda: [offer(), start(), other_codec()],
        grpc.StatusCode.INVALID_ARGUMENT,
        "first.w_in codec",
        "must be 2",
    ),
    "not a number": (
        lambda: [offer(), start(), piece(0, torch.tensor(float("nan")))],
        grpc.StatusCode.INVALID_ARGUMENT,
        "first.w_in",
        "holds NaN or infinity",
    ),
    "moments out of range": (
        lambda: [offer(), start(), *(piece(n, torch.tensor(2.0)) for n in range(N_PIECES))],
        grpc.StatusCode.INVALID_ARGUMENT,
        "second.w_in",
        "the limit is",
    ),
    "a piece of three megabytes": (
        lambda: [offer(), start(), b"x" * (3 << 20)],
        grpc.StatusCode.INVALID_ARGUMENT,
        "message bytes",
        "the limit is",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
async def test_hostile_bytes_are_refused_by_name_and_the_node_goes_on(name: str) -> None:
    build, status, field, problem = HOSTILE[name]
    a, b = two_replicas()
    before = b.raw()
    async with averaging_node("peer-b", b) as node_b, averaging_node("peer-a", a) as node_a:
        error = await send_all(node_b.endpoint, build())
        assert error.code() is status
        assert dict(error.trailing_metadata() or ())["kilohive-field"] == field
        assert problem in (error.details() or "")
        assert b.raw() == before
        assert [m.block for m in (await node_a.exchange_with(node_b)).blocks] == [BLOCK]


async def test_an_offer_in_somebody_elses_name_is_refused() -> None:
    _, b = two_replicas()
    caller = Identity.generate()
    metadata = CallSigner(caller).metadata("peer-b", f"/{SERVICE_NAME}/Exchange")
    async with averaging_node("peer-b", b) as node_b:
        error = await send_all(node_b.endpoint, [offer()], metadata)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"is 'evil', but {caller.peer_id} has signed the call" in (error.details() or "")
        accepted = await send_all(node_b.endpoint, [offer(peer_id=caller.peer_id), piece()], metadata)
        assert "must be start" in (accepted.details() or ""), "its own name is taken, and what follows is looked at"


async def send_all(
    endpoint: str, messages: list[pb.ExchangeMessage | bytes], metadata: tuple[tuple[str, bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    """What a dialler that speaks in turn, and then waits, gets told."""
    async with plain_aio_channel(endpoint) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE_NAME}/Exchange")(timeout=WAIT_S, metadata=metadata)
        try:
            for message in messages:
                await call.write(message if isinstance(message, bytes) else message.SerializeToString())
                await call.read()
            await call.read()
        except grpc.aio.AioRpcError as error:
            return error
        pytest.fail("the node took everything")


async def test_a_hostile_answer_is_refused_by_name_and_the_dialler_goes_on() -> None:
    """An answerer whose moments are negative; the dialler's replica stays as it was."""
    a, b = two_replicas()
    before = a.raw()
    honest = b.state.second["w_in"].clone()
    b.state.second["w_in"].neg_()
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        result = await node_a.exchange_with(node_b)
        assert result.problem.startswith("second.w_in: an average of squares cannot be")
        assert result.refused == {BLOCK: result.problem}
        assert a.raw() == before
        b.state.second["w_in"].copy_(honest)
        assert [m.block for m in (await exchange_once_free(node_a, node_b)).blocks] == [BLOCK]


async def exchange_once_free(node: AveragingNode, partner: AveragingNode) -> ExchangeResult:
    """A partner may still be ending the exchange before, and says when to come again."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await node.exchange_with(partner)
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after_s)


async def test_a_block_of_another_schema_is_refused_and_the_rest_goes_on() -> None:
    odd = make_state(3)
    odd.params["w_in"] = odd.params["w_in"].double()
    a, b = two_replicas(TRUNK)
    async with (
        averaging_node("peer-a", MemoryReplica(odd), a) as node_a,
        averaging_node("peer-b", MemoryReplica(make_state(4)), b) as node_b,
    ):
        result = await node_a.exchange_with(node_b, [BLOCK, TRUNK, BlockId(5, 5)])
    assert [m.block for m in result.blocks] == [TRUNK]
    assert result.refused == {
        BLOCK: "its tensors there are of other names, shapes or types",
        BlockId(5, 5): "no longer hosted here",
    }


async def test_two_nodes_that_dial_each_other_at_once_move_the_block_together() -> None:
    a, b = two_replicas()
    async with averaging_node("peer-a", a) as node_a, averaging_node("peer-b", b) as node_b:
        both = await asyncio.gather(node_a.exchange_with(node_b), node_b.exchange_with(node_a), return_exceptions=True)
        moved = [r for r in both if not isinstance(r, BaseException) and r.blocks]
        assert moved
        assert not [r for r in both if isinstance(r, BaseException)]
    assert distance(a, b) < 1e-6
