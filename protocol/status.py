"""The one mapping between our errors and gRPC's status codes, both ways.

On the wire an error is a gRPC status plus trailing metadata (`kilohive-error`, `kilohive-field`,
`kilohive-retry-after-ms`), so that a caller gets back the type that the peer raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from common.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidInputError,
    KilohiveError,
    LimitExceededError,
    NotHostedError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownRequestError,
    UnknownRunError,
)
from common.text import peer_words

if TYPE_CHECKING:
    from collections.abc import Mapping

ERROR_KEY = "kilohive-error"
FIELD_KEY = "kilohive-field"
RETRY_KEY = "kilohive-retry-after-ms"
REASON_KEY = "kilohive-reason"
"""Why a node's health is what it is."""

MAX_MESSAGE_CHARS = 500
MAX_RETRY_AFTER_S = 60.0


# Subclasses stand before their bases: the first match wins on the way out.
_STATUS_OF: dict[type[KilohiveError], grpc.StatusCode] = {
    LimitExceededError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownRunError: grpc.StatusCode.NOT_FOUND,
    NotHostedError: grpc.StatusCode.NOT_FOUND,
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownRequestError: grpc.StatusCode.FAILED_PRECONDITION,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    KilohiveError: grpc.StatusCode.INTERNAL,
}


# What a bare status means when the peer sent none of our metadata (gRPC itself answered).
_ERROR_OF_BARE_STATUS: dict[grpc.StatusCode, type[KilohiveError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnavailableError,
}


_BY_NAME: dict[str, type[KilohiveError]] = {cls.__name__: cls for cls in _STATUS_OF}


def status_of(error: KilohiveError) -> grpc.StatusCode:
    """Status code under which `error` crosses the wire."""
    return next(status for cls, status in _STATUS_OF.items() if isinstance(error, cls))


def trailing_metadata_of(error: KilohiveError) -> tuple[tuple[str, str], ...]:
    """Metadata that lets the caller rebuild `error` with its type and field."""
    rows = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, InvalidInputError):
        rows.append((FIELD_KEY, error.field))
    if isinstance(error, OverloadedError):
        rows.append((RETRY_KEY, str(int(error.retry_after_s * 1000))))
    return tuple(rows)


def error_from_status(status: grpc.StatusCode, message: str, metadata: Mapping[str, str]) -> KilohiveError:
    """Rebuild the peer's error; nothing that it sent is believed beyond its bounds."""
    # Printable only: these words end up in people's terminals.
    message = peer_words(message, MAX_MESSAGE_CHARS)
    cls = _BY_NAME.get(metadata.get(ERROR_KEY, ""))
    if cls is None:
        return _from_bare_status(status, message)
    if issubclass(cls, InvalidInputError):
        field = metadata.get(FIELD_KEY, "request")[:MAX_MESSAGE_CHARS]
        rebuilt = InvalidInputError.__new__(cls)
        InvalidInputError.__init__(rebuilt, field, message.removeprefix(f"{field}: "))
        return rebuilt
    if cls is OverloadedError:
        return OverloadedError(message, _retry_after_s(metadata.get(RETRY_KEY, "")))
    return cls(message)


def _from_bare_status(status: grpc.StatusCode, message: str) -> KilohiveError:
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC refuses an oversize message itself, before a byte of it is parsed.
        if "larger than max" in message:
            return InvalidInputError("message", message)
        return OverloadedError(message)
    return _ERROR_OF_BARE_STATUS.get(status, InternalError)(message or status.name)


def _retry_after_s(text: str) -> float:
    return min(int(text) / 1000, MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() and len(text) <= 9 else 1.0  # noqa: PLR2004
