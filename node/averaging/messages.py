"""The messages of an exchange or a download, checked before they are believed."""

from __future__ import annotations

from common.errors import InvalidInputError, LimitExceededError
from protocol import averaging_pb2 as pb
from protocol.limits import MAX_OFFERED_BLOCKS, MAX_PIECE_BYTES
from protocol.parsing import parse_message

MAX_PIECE_MESSAGE_BYTES = 2 * MAX_PIECE_BYTES


MAX_OFFER_MESSAGE_BYTES = 1024 + 128 * MAX_OFFERED_BLOCKS


def unpack(raw: bytes, max_bytes: int) -> pb.ExchangeMessage:
    """A peer's message; raises LimitExceededError before it is parsed, InvalidInputError when it is cut off."""
    if len(raw) > max_bytes:
        raise LimitExceededError("message bytes", len(raw), max_bytes)
    return parse_message(pb.ExchangeMessage, raw)


def require(message: pb.ExchangeMessage, *kinds: str) -> str:
    """Which of `kinds` a message is; InvalidInputError if none."""
    kind = message.WhichOneof("body") or "empty"
    if kind not in kinds:
        raise InvalidInputError("message", f"is {kind}, must be {' or '.join(kinds)} now")
    return kind
