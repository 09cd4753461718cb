"""What every relay speaks and grants alike, on asyncio (`dht/relay/relay.py`) or on trio (the lighthouse). Pure.

Imports no hivemind, so that a lighthouse can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import InvalidInputError, OverloadedError, UnavailableError
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


def no_reservation_left(limit: int) -> OverloadedError:
    """Make the error for a caller who comes when all reservations are taken."""
    return OverloadedError(f"this relay has {limit} reservations, the most it takes")


def no_circuit_left(n_circuits: int, of_caller: int) -> OverloadedError:
    """Make the error for a caller who wants one circuit too many."""
    return OverloadedError(f"this relay carries {n_circuits} circuits, {of_caller} of yours")


def _host(address: str) -> str:
    """The /ip4/... or /ip6/... part of a multiaddress."""
    return "/".join(address.split("/")[:3])
