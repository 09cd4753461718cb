"""Calls of hivemind's DHT as bytes: frames with their length before them, and what is in them. No sockets here.

A call is one libp2p stream whose protocol is the method's name: a request frame, then an answer frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from google.protobuf.message import Message

from common.errors import InvalidInputError, LimitExceededError, UnavailableError
from common.text import peer_words
from coordinator.lighthouse.hivemind_pb2 import Answer, Call, Frame
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

M = TypeVar("M", bound=Message)

MAX_FRAME_BYTES = 4 << 20
"""What p2pd refuses to carry beyond."""

CALL_ID_BYTES = 16
MAX_ERROR_CHARS = 200
_MAX_LENGTH_BYTES = 4
"""The longest varint: four bytes take 28 bits, more than a frame may have."""


class DhtRequest(NamedTuple):
    """A call that came in: `body` is the request message, not parsed yet."""

    call_id: bytes
    method: str
    body: bytes


def framed(message: Message) -> bytes:
    """A message with its length before it; raises LimitExceededError."""
    body = message.SerializeToString()
    if len(body) > MAX_FRAME_BYTES:
        raise LimitExceededError("frame", len(body), MAX_FRAME_BYTES)
    return _varint(len(body)) + body


async def read_frame(read: Callable[[int], Awaitable[bytes]]) -> Frame:
    """The next frame, read as `read_message` reads."""
    return await read_message(read, Frame, MAX_FRAME_BYTES)


async def read_message(read: Callable[[int], Awaitable[bytes]], kind: type[M], max_bytes: int) -> M:
    """The next message; `read` gives at most as many bytes as asked for, none at the end. The caller bounds the time.

    Raises:
        InvalidInputError: the stream ends early, the length is over the limit, or it is no such message.
    """
    length = 0
    for place in range(_MAX_LENGTH_BYTES):
        (byte,) = await _read_exactly(read, 1)
        length |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:  # noqa: PLR2004 - a varint's last byte
            break
    else:
        raise InvalidInputError("frame", f"its length takes more than {_MAX_LENGTH_BYTES} bytes")
    if length > max_bytes:
        raise LimitExceededError("frame", length, max_bytes)
    return parse_message(kind, await _read_exactly(read, length), "frame")


def request_frame(call_id: bytes, peer: bytes, method: str, request: Message) -> Frame:
    """A call to make, of the peer whose id is `peer`."""
    return Frame(call_id=call_id, call=Call(peer=peer, method=method, request=request.SerializeToString()))


def request_in(frame: Frame, method: str) -> DhtRequest:
    """The call in a frame that came on a stream for `method`; raises InvalidInputError."""
    _check_call_id(frame)
    if frame.WhichOneof("body") != "call":
        raise InvalidInputError("frame", "holds no call")
    if frame.call.method != method:
        raise InvalidInputError("method", f"is {frame.call.method[:60]!r} on a stream for {method}")
    return DhtRequest(frame.call_id, method, frame.call.request)


def answer_frame(call_id: bytes, response: Message) -> Frame:
    """The answer to a call."""
    return Frame(call_id=call_id, answer=Answer(response=response.SerializeToString()))


def refusal_frame(call_id: bytes, error: Exception) -> Frame:
    """The answer to a call that was refused."""
    return Frame(call_id=call_id, answer=Answer(error=str(error)[:MAX_ERROR_CHARS].encode()))


def answer_in(frame: Frame, call_id: bytes, kind: type[M]) -> M:
    """The response to our call `call_id`.

    Raises:
        InvalidInputError: it is not the answer to this call, or not a `kind`.
        UnavailableError: the peer refused, in the words that it gave.
    """
    _check_call_id(frame)
    if frame.call_id != call_id:
        raise InvalidInputError("call_id", "is another call's")
    match frame.answer.WhichOneof("result"):
        case "response":
            return parse_message(kind, frame.answer.response, "response")
        case "error":
            words = frame.answer.error[:MAX_ERROR_CHARS].decode(errors="replace")
            raise UnavailableError(f"the peer refused: {peer_words(words)}")
    raise InvalidInputError("frame", "holds no answer")


def _check_call_id(frame: Frame) -> None:
    if len(frame.call_id) != CALL_ID_BYTES:
        raise InvalidInputError("call_id", f"must be {CALL_ID_BYTES} bytes, is {len(frame.call_id)}")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


async def _read_exactly(read: Callable[[int], Awaitable[bytes]], length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = await read(length)
        if not part:
            raise InvalidInputError("frame", f"ends {length} bytes early")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
