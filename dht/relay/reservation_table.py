"""Which nodes a relay leads to, each through a stream that the node has opened and keeps open. Pure.

What a relay decides of a request is decided here, on asyncio (`dht/relay/relay.py`) and on trio (the lighthouse) alike;
they send and wait. Imports no hivemind, so that a lighthouse can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from dht.relay.quotas import P
from dht.relay.relaying import MAX_ADDRESSES, not_reached

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dht.relay.quotas import Circuit, RelayQuotas


class NodeStream(Protocol):
    """A stream with a node whose peer id is proven."""

    @property
    def peer_id(self) -> str:
        """The peer id of the node at its other end."""


S = TypeVar("S", bound=NodeStream)


class Reservation(Generic[P, S]):
    """A node that is reached through its stream, and where it says that it may be dialled.

    `peer` and `address` are what quotas count it by.
    """

    def __init__(self, stream: S, told: Iterable[str], *, peer: P, address: str = "") -> None:
        self.stream, self.told = stream, tuple(told)[:MAX_ADDRESSES]
        self.peer, self.address = peer, address


H = TypeVar("H", bound=Reservation[Any, Any])


class ReservationTable(Generic[P, H]):
    """The reservations of nodes at one relay, by peer id."""

    def __init__(self, quotas: RelayQuotas[P]) -> None:
        self._quotas = quotas
        self._held: dict[str, H] = {}

    def __len__(self) -> int:
        """Nodes that are reached through this relay."""
        return len(self._held)

    def take(self, reservation: H) -> None:
        """Reserve; who reserves again is reached through the new stream. Raises OverloadedError."""
        self._quotas.reserve(reservation.peer, reservation.address, "kilohive")
        self._held[reservation.stream.peer_id] = reservation

    def renew(self, reservation: H) -> None:
        """The node is still there. Raises OverloadedError if its reservation had ended and there is no other."""
        if self._held.get(reservation.stream.peer_id) is reservation:  # it has not reserved again
            self._quotas.reserve(reservation.peer, reservation.address, "kilohive")

    def drop(self, reservation: H) -> None:
        """The node's stream has ended."""
        if self._held.get(reservation.stream.peer_id) is reservation:  # it has not reserved again
            del self._held[reservation.stream.peer_id]
            self._quotas.release(reservation.peer, "kilohive")

    def connect(self, caller: P, target_id: str) -> tuple[H, Circuit[P]]:
        """The node that a caller is led to, and the circuit that is open from now on until it is closed.

        Raises:
            UnavailableError: the node has not reserved here.
            OverloadedError: there are too many circuits, in all, of this caller or to this node.
        """
        reservation = self._held.get(target_id)
        if reservation is None:
            raise not_reached(target_id)
        return reservation, self._quotas.open(caller, reservation.peer, "kilohive")
