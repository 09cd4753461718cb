"""Every error Kilohive raises on purpose, and its one mapping to gRPC status codes.

    KilohiveError
    ├── InvalidInputError        a value that cannot be right: names the field and what is wrong
    │   ├── LimitExceededError   a value over a limit: names the field, the value and the limit
    │   ├── UnknownRunError      the request is for a run that this node does not serve
    │   └── NotHostedError       the request names an expert that this node does not host
    ├── UnknownRequestError      a backward whose forward is not kept here: send the inputs again
    ├── OverloadedError          a bounded queue is full: try again after `retry_after_s`
    ├── DeadlineError            the answer would come too late
    ├── DrainingError            the node is leaving
    ├── UnavailableError         a peer cannot be reached
    ├── UnauthenticatedError     a call that its caller has not signed, or not for this node, or not now
    ├── NoRoomError              a device without memory for one more block or batch
    ├── InternalError            a peer failed in a way it did not name
    ├── TooFewExpertsError       fewer than `k_min` experts answered for some token
    ├── RecordError              a DHT record that is malformed, forged or expired
    ├── IdentityError            a key that is missing, damaged or readable by others
    ├── ManifestError            a manifest that is malformed or out of range
    ├── DataError                a corpus that is missing, unreadable or too small
    ├── CheckpointError          a checkpoint that is damaged or cannot be written
    └── ConfigError              a mistake on the command line: exit code 2

On the wire an error is a gRPC status plus trailing metadata (`kilohive-error`, `kilohive-field`,
`kilohive-retry-after-ms`), so that a caller gets back the type that the peer raised.
The message never holds a stack trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DrainingError",
    "IdentityError",
    "InternalError",
    "InvalidInputError",
    "KilohiveError",
    "LimitExceededError",
    "ManifestError",
    "NoRoomError",
    "NotHostedError",
    "OverloadedError",
    "RecordError",
    "TooFewExpertsError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownRequestError",
    "UnknownRunError",
    "error_from_status",
    "status_of",
    "trailing_metadata_of",
]

ERROR_KEY = "kilohive-error"
FIELD_KEY = "kilohive-field"
RETRY_KEY = "kilohive-retry-after-ms"
MAX_MESSAGE_CHARS = 500
MAX_RETRY_AFTER_S = 60.0


class KilohiveError(Exception):
    """Root of the tree; `str(error)` is one sentence for a person."""

    exit_code = 1


class InvalidInputError(KilohiveError):
    """A value that cannot be right, named by its field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class LimitExceededError(InvalidInputError):
    """A value over a named limit."""

    def __init__(self, field: str, value: float, limit: float) -> None:
        super().__init__(field, f"is {value}, but the limit is {limit}")


class UnknownRunError(InvalidInputError):
    """The request is for a run that this node does not serve."""


class NotHostedError(InvalidInputError):
    """The request names a layer or expert that this node does not host."""


class UnknownRequestError(KilohiveError):
    """A backward whose forward inputs are not kept: the caller sends them again."""


class OverloadedError(KilohiveError):
    """A bounded queue is full; `retry_after_s` (seconds) says when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(KilohiveError):
    """The answer would come after the caller's deadline."""


class DrainingError(KilohiveError):
    """The node is leaving and takes no new work."""


class UnavailableError(KilohiveError):
    """A peer cannot be reached."""


class UnauthenticatedError(KilohiveError):
    """A call that its caller has not signed, or not for this node, or not now."""


class NoRoomError(KilohiveError):
    """A device has no memory for one more block, or for a batch."""


class InternalError(KilohiveError):
    """A peer failed in a way that it did not name."""


class TooFewExpertsError(KilohiveError):
    """Fewer than `k_min` experts answered for some token of a layer; none was live if `failed_peers` is empty."""

    def __init__(self, message: str, failed_peers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failed_peers = failed_peers


class RecordError(KilohiveError):
    """A DHT record that is malformed, forged, oversize or expired."""


class IdentityError(KilohiveError):
    """A key that is missing, damaged or readable by others, or a signature that does not hold."""


class ManifestError(KilohiveError):
    """A manifest that is malformed or has a field out of range."""


class DataError(KilohiveError):
    """A corpus that is missing, unreadable or too small."""


class CheckpointError(KilohiveError):
    """A checkpoint that is damaged or cannot be written."""


class ConfigError(KilohiveError):
    """A mistake on the command line or in a configuration file."""

    exit_code = 2


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
    message = "".join(char if char.isprintable() else "?" for char in message[:MAX_MESSAGE_CHARS])
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
