"""What a failed gRPC call means: the peer's own error by its type, or that the call never left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import KilohiveError, UnavailableError
from protocol.security import NotConnectedError
from protocol.status import error_from_status

if TYPE_CHECKING:
    from collections.abc import Mapping

    import grpc


_NOT_CONNECTED = "failed to connect to all addresses"
"""How gRPC's status begins when a call found no connection to leave on."""


def is_lost(error: KilohiveError) -> bool:
    """Whether a call got lost on its way: the peer was there, and may or may not have had it."""
    return isinstance(error, UnavailableError) and not isinstance(error, NotConnectedError)


def rebuilt_error(code: grpc.StatusCode, details: str | None, trailing: grpc.aio.Metadata | None) -> KilohiveError:
    """The error that a call's status tells: the peer's own by its type, NotConnectedError if the call never left."""
    metadata: Mapping[str, str] = {k: v for k, v in trailing or () if isinstance(v, str)}
    rebuilt = error_from_status(code, details or "", metadata)
    if isinstance(rebuilt, UnavailableError) and str(rebuilt).startswith(_NOT_CONNECTED):
        return NotConnectedError(str(rebuilt))
    return rebuilt
