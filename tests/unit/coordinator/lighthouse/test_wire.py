"""Frames of hivemind's DHT calls, beside hivemind's own messages; and bytes that are none."""

from __future__ import annotations

import asyncio

import pytest
from hivemind.proto import dht_pb2, p2pd_pb2
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError, UnavailableError
from coordinator.lighthouse import hivemind_pb2 as ours
from coordinator.lighthouse import wire
from protocol.parsing import parse_message

CALL_ID = bytes(range(16))
METHOD = "DHTProtocol.rpc_ping"


def read(data: bytes, at_once: int = 1 << 30) -> ours.Frame:
    left = bytearray(data)

    async def some(n: int) -> bytes:
        part = bytes(left[: min(n, at_once)])
        del left[: len(part)]
        return part

    return asyncio.run(wire.read_frame(some))


def test_our_call_is_one_that_p2pd_reads() -> None:
    request = ours.PingRequest(peer=ours.NodeInfo(node_id=b"n" * 20), validate=True)
    raw = wire.request_frame(CALL_ID, b"peer", METHOD, request).SerializeToString()
    theirs = p2pd_pb2.PersistentConnectionRequest.FromString(raw)
    assert (theirs.callId, theirs.callUnary.peer, theirs.callUnary.proto) == (CALL_ID, b"peer", METHOD)
    assert dht_pb2.PingRequest.FromString(theirs.callUnary.data).peer.node_id == b"n" * 20


def test_p2pds_call_and_its_answer_are_read() -> None:
    data = dht_pb2.PingRequest(validate=True).SerializeToString()
    call = p2pd_pb2.CallUnaryRequest(peer=b"me", proto=METHOD, data=data)
    theirs = p2pd_pb2.PersistentConnectionRequest(callId=CALL_ID, callUnary=call)
    request = wire.request_in(ours.Frame.FromString(theirs.SerializeToString()), METHOD)
    assert parse_message(ours.PingRequest, request.body, "request").validate
    response = dht_pb2.PingResponse(dht_time=7.5, available=True).SerializeToString()
    answer = p2pd_pb2.PersistentConnectionRequest(
        callId=CALL_ID, unaryResponse=p2pd_pb2.CallUnaryResponse(response=response)
    )
    frame = ours.Frame.FromString(answer.SerializeToString())
    assert wire.answer_in(frame, CALL_ID, ours.PingResponse).dht_time == 7.5


@pytest.mark.parametrize(
    "name",
    ["PingRequest", "PingResponse", "StoreRequest", "StoreResponse", "FindRequest", "FindResult", "FindResponse"],
)
def test_every_field_of_a_message_has_hiveminds_number_and_type(name: str) -> None:
    theirs = {f.name: f for f in dht_pb2.DESCRIPTOR.message_types_by_name[name].fields if f.name != "auth"}
    mine = {f.name: f for f in ours.DESCRIPTOR.message_types_by_name[name].fields}
    assert mine.keys() == theirs.keys()
    for field, other in theirs.items():
        assert (mine[field].number, mine[field].type, mine[field].is_repeated) == (
            other.number,
            other.type,
            other.is_repeated,
        )


def test_the_results_of_a_search_have_hiveminds_numbers() -> None:
    assert dict(ours.ResultType.items()) == dict(dht_pb2.ResultType.items())


@given(st.binary(max_size=3000), st.integers(1, 7))
def test_a_frame_is_read_whole_however_it_comes(request: bytes, at_once: int) -> None:
    frame = ours.Frame(call_id=CALL_ID, call=ours.Call(peer=b"p", method=METHOD, request=request))
    assert wire.request_in(read(wire.framed(frame), at_once), METHOD).body == request


@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_a_named_error(data: bytes) -> None:
    assert outcome(data) in {"frame", "call_id", "method", "a call"}


def outcome(data: bytes) -> str:
    """The field that the error names; anything but that error escapes."""
    try:
        wire.request_in(read(data), METHOD)
    except InvalidInputError as error:
        return error.field
    return "a call"


@given(st.integers(1, 100))
def test_a_frame_cut_short_says_so(cut: int) -> None:
    whole = wire.framed(wire.answer_frame(CALL_ID, ours.PingResponse(dht_time=1.0)))
    with pytest.raises(InvalidInputError, match=r"frame: ends \d+ bytes early"):
        read(whole[: -min(cut, len(whole))])


def test_a_length_over_the_limit_is_refused_before_a_byte_of_it_is_read() -> None:
    with pytest.raises(LimitExceededError, match="frame: is 4194305, but the limit is 4194304"):
        read(b"\x81\x80\x80\x02")
    with pytest.raises(InvalidInputError, match="more than 4 bytes"):
        read(b"\xff" * 9)


def test_a_frame_over_the_limit_is_not_sent() -> None:
    with pytest.raises(LimitExceededError):
        wire.framed(ours.Call(request=bytes(wire.MAX_FRAME_BYTES)))


def test_a_call_on_another_methods_stream_is_refused() -> None:
    frame = wire.request_frame(CALL_ID, b"p", "DHTProtocol.rpc_store", ours.StoreRequest())
    with pytest.raises(InvalidInputError, match=r"method: is 'DHTProtocol\.rpc_store'"):
        wire.request_in(frame, METHOD)


def test_a_refusal_reaches_the_caller_in_printable_words() -> None:
    frame = wire.refusal_frame(CALL_ID, ValueError("no\x1b[31m room"))
    with pytest.raises(UnavailableError, match=r"the peer refused: no\?\[31m room"):
        wire.answer_in(frame, CALL_ID, ours.PingResponse)


def test_another_calls_answer_is_not_taken() -> None:
    frame = wire.answer_frame(bytes(16), ours.PingResponse())
    with pytest.raises(InvalidInputError, match="call_id: is another call's"):
        wire.answer_in(frame, CALL_ID, ours.PingResponse)
