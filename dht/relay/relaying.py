"""What every relay speaks and grants alike, on asyncio (`dht/relay/relay.py`) or on trio (the lighthouse). Pure.

Imports no hivemind, so that a lighthouse can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import InvalidInputError, KilohiveError, OverloadedError, UnavailableError
from protocol import relay_pb2 as pb
from protocol.identity import PEER_ID_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


RELAY_PROTOCOL = "kilohive/relay/1"
TUNNEL_PROTOCOL = "kilohive/tunnel/1"
REQUEST_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 5.0
NOTE_EVERY_S = 5.0
MAX_ADDRESSES = 4
IDLE_S = 120.0
"""A circuit over which nothing moved for so long is closed: who still needs it opens another."""


def places(seen: Sequence[str], told: Iterable[str]) -> list[str]:
    """Where a peer may be dialled. What it says of itself counts only at an IP address that it is seen at."""
    hosts = {_host(address) for address in seen}
    believed = [address for address in told if _host(address) in hosts]
    return list(dict.fromkeys([*seen, *believed]))[:MAX_ADDRESSES]


def not_what_is_wanted() -> InvalidInputError:
    """Make the error for a request for nothing that a relay has."""
    return InvalidInputError("wanted", "must be reserve or connect")


def not_reached(peer_id: str) -> UnavailableError:
    """Make the error for a peer that has not reserved here."""
    return UnavailableError(f"{peer_id[: PEER_ID_CHARS + 1]!r} is not reached through this relay")


class RelayLimitError(OverloadedError):
    """A relay has reached a limit; `limit` names it with its value and how it is set, for both sides' logs."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


def no_reservation_left(limit: int, setting: str) -> RelayLimitError:
    """Make the error for a caller who comes when all reservations are taken."""
    return RelayLimitError(f"this relay has {limit} reservations, the most it takes", limit_text(limit, setting))


def no_circuit_left(n_circuits: int, of_caller: int, limit: str) -> RelayLimitError:
    """Make the error for a caller who wants one circuit too many."""
    return RelayLimitError(f"this relay carries {n_circuits} circuits, {of_caller} of yours", limit)


def limit_text(limit: int, setting: str) -> str:
    """How a limit is named: by the relay's flag or setting, if it has one."""
    return f"its {setting} is {limit}" if setting else f"its limit of {limit} has no setting"


def refusal(error: KilohiveError) -> pb.RelayResponse:
    """What a relay answers to a request that it refuses."""
    limit = error.limit if isinstance(error, RelayLimitError) else ""
    return pb.RelayResponse(problem=str(error), limit=limit)


def _host(address: str) -> str:
    """The /ip4/... or /ip6/... part of a multiaddress."""
    return "/".join(address.split("/")[:3])
