"""From a peer's bytes to a protobuf message, with an error of ours where protobuf would raise its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from common.errors import InvalidInputError, KilohiveError, LimitExceededError

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", bound=Message)


def parse_message(kind: type[M], raw: bytes, field: str = "message", max_bytes: int | None = None) -> M:
    """A message of `kind`; raises InvalidInputError naming `field`, in which the bytes came.

    More than `max_bytes` are refused unread: a message of many small parts takes many times its bytes.
    """
    if max_bytes is not None and len(raw) > max_bytes:
        raise LimitExceededError(f"{field} bytes", len(raw), max_bytes)
    return parse_or_raise(kind, raw, lambda problem: InvalidInputError(field, problem))


def parse_or_raise(kind: type[M], raw: bytes, error: Callable[[str], KilohiveError]) -> M:
    """A message of `kind`; raises what `error` makes of a sentence about the bytes."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise error(f"{len(raw)} bytes are not a whole {kind.DESCRIPTOR.full_name}") from None
