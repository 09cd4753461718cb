"""Messages on a stream of bytes, each with its length before it. Imports no hivemind, so that a lighthouse can."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from common.errors import InvalidInputError

if TYPE_CHECKING:
    from google.protobuf.message import Message

SEND_TIMEOUT_S = 5.0
MAX_CONTROL_BYTES = 4096
PIECE_BYTES = 1 << 16
_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


def packed(message: Message) -> bytes:
    """A message with its length before it."""
    raw = message.SerializeToString()
    return _LENGTH.pack(len(raw)) + raw


def length_in(header: bytes) -> int:
    """Bytes of the message that LENGTH_BYTES announce; raises InvalidInputError over the limit."""
    length: int = _LENGTH.unpack(header)[0]
    if length > MAX_CONTROL_BYTES:
        raise InvalidInputError("message", f"is {length} bytes, the limit is {MAX_CONTROL_BYTES}")
    return length
