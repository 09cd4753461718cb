"""Every error that Kilohive raises on purpose. `protocol/status.py` maps them to gRPC status codes and back.

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
    ├── RefusedError             a peer finds that what it was sent cannot be right
    ├── DivergedError            a training whose loss, or a model whose logits, are no longer finite numbers
    ├── TooFewExpertsError       fewer than `k_min` experts answered for some token
    ├── RecordError              a DHT record that is malformed, forged or expired
    ├── IdentityError            a key that is missing, damaged or readable by others
    ├── ManifestError            a manifest that is malformed or out of range
    ├── DataError                a corpus that is missing, unreadable or too small
    ├── CheckpointError          a checkpoint that is damaged or cannot be written
    ├── StorageError             a database that is damaged or cannot be written
    └── ConfigError              a mistake on the command line: exit code 2

The message never holds a stack trace.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DivergedError",
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
    "RefusedError",
    "StorageError",
    "TooFewExpertsError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownRequestError",
    "UnknownRunError",
]


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

    def __init__(self, field: str, value: float, limit: float, why: str = "") -> None:
        super().__init__(field, f"is {value}, but the limit is {limit}{why and f': {why}'}")


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


class RefusedError(KilohiveError):
    """A peer finds that what it was sent cannot be right: the caller's fault, or a peer of another version."""


class DivergedError(KilohiveError):
    """A training whose loss is no longer a finite number, or a model whose logits are not.

    sequences: those of a generation whose logits are not finite; the others can go on.
    """

    def __init__(self, message: str, sequences: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.sequences = sequences


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


class StorageError(KilohiveError):
    """A database that is damaged or cannot be written."""


class ConfigError(KilohiveError):
    """A mistake on the command line or in a configuration file."""

    exit_code = 2
