"""What a relay has promised and to whom: reservations and circuits within their limits. Pure.

A node's relay and a lighthouse act on it. Imports no hivemind, so that a lighthouse can.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

from common.errors import UnavailableError
from common.seldom import Seldom
from dht.relay.relaying import RelayLimitError, limit_text, no_circuit_left, no_reservation_left

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from typing import Self

logger = logging.getLogger(__name__)

P = TypeVar("P", bound="Hashable")
"""A peer's id, as text or as bytes."""

Way = Literal["libp2p", "kilohive"]
"""How a peer is reached through its reservation: libp2p's circuits, or streams as nodes relay them."""

RESERVATION_S = 3600.0
"""A reservation's life; peers renew theirs long before."""

MAX_RESERVATIONS_PER_ADDRESS = 16
"""Peers behind one public address: more than a household has, and not enough to take all."""

MAX_CIRCUITS_PER_PEER = 16
"""Out of one peer and, at a lighthouse, into one peer."""

ANY_NUMBER = 1 << 62


class RelaySettings(Protocol):
    """What a node's owner lets it carry for others; `relay_circuits` of 0 is nothing."""

    @property
    def relay_circuits(self) -> int:
        """The most circuits that are open at once."""

    @property
    def relay_circuits_per_caller(self) -> int:
        """The most of those circuits that one caller may have."""

    @property
    def relay_reservations(self) -> int:
        """The most peers that are reached through this node."""


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """How much a relay carries for others: peers that reserve, open circuits in all, of one caller and to one peer.

    `circuit_bytes` counts both ways of one circuit together, `circuit_s` is its longest life. The `_setting`s say how
    the relay's owner sets a limit, as the log names it; none where it is fixed.
    """

    max_reservations: int = 32
    max_circuits: int = 64
    max_circuits_per_caller: int = MAX_CIRCUITS_PER_PEER
    max_circuits_per_target: int = ANY_NUMBER
    circuit_bytes: int = ANY_NUMBER
    circuit_s: float = math.inf
    reservations_setting: str = "relay_reservations"
    circuits_setting: str = "--relay-circuits"
    caller_setting: str = "relay_circuits_per_caller"

    @classmethod
    def of(cls, settings: RelaySettings) -> Self:
        """Make the limits of a node from its owner's settings."""
        return cls(
            max_reservations=settings.relay_reservations,
            max_circuits=settings.relay_circuits,
            max_circuits_per_caller=settings.relay_circuits_per_caller,
        )


class _Reserved(NamedTuple):
    expires_s: float
    address: str


class Circuit(Generic[P]):
    """One circuit's account."""

    def __init__(self, source: P, target: P, max_bytes: int) -> None:
        self.source, self.target = source, target
        self.left_bytes = max_bytes

    def spend(self, n_bytes: int) -> bool:
        """Whether so many bytes more may pass; if so, they are counted."""
        if n_bytes > self.left_bytes:
            return False
        self.left_bytes -= n_bytes
        return True


class RelayQuotas(Generic[P]):
    """Reservations and circuits of one relay; `clock` gives seconds."""

    def __init__(self, limits: RelayLimits, clock: Callable[[], float]) -> None:
        self.limits, self._clock = limits, clock
        self._reserved: dict[tuple[Way, P], _Reserved] = {}
        self._circuits: set[Circuit[P]] = set()
        self._told = Seldom(clock=clock)
        self.relayed_bytes = 0
        self.refused = 0

    @property
    def n_reservations(self) -> int:
        """Reservations that hold."""
        now_s = self._clock()
        return sum(reserved.expires_s > now_s for reserved in self._reserved.values())

    @property
    def n_circuits(self) -> int:
        """Circuits that are open."""
        return len(self._circuits)

    def reserve(self, peer: P, address: str, way: Way = "libp2p") -> float:
        """Reserve for a peer that is connected from `address`, or renew; until when. Raises OverloadedError."""
        self._expire()
        if (way, peer) not in self._reserved:
            self._check_capacity(address)
        expires_s = self._clock() + RESERVATION_S
        self._reserved[way, peer] = _Reserved(expires_s, address)
        return expires_s

    def has_reserved(self, peer: P, way: Way = "libp2p") -> bool:
        """Whether a peer's reservation holds."""
        reserved = self._reserved.get((way, peer))
        return reserved is not None and reserved.expires_s > self._clock()

    def release(self, peer: P, way: Way) -> None:
        """A peer gives its reservation up."""
        self._reserved.pop((way, peer), None)

    def keep_only(self, connected: Iterable[P]) -> None:
        """Drop reservations of peers that have left: nobody can be led to them."""
        here = set(connected)
        self._reserved = {held: reserved for held, reserved in self._reserved.items() if held[1] in here}

    def open(self, source: P, target: P, way: Way = "libp2p") -> Circuit[P]:
        """Open a circuit. Raises UnavailableError if the target has no reservation, OverloadedError at a limit."""
        self._expire()
        if (way, target) not in self._reserved:
            raise UnavailableError("relay: the peer has no reservation here")
        out_of, into = self._circuits_of(source, target)
        if (limit := self._circuit_limit(out_of)) is not None:
            self._refuse(no_circuit_left(len(self._circuits), out_of, limit))
        if into >= self.limits.max_circuits_per_target:
            words = f"this relay carries {into} circuits to that peer, the most it takes"
            self._refuse(RelayLimitError(words, limit_text(self.limits.max_circuits_per_target, "")))
        circuit = Circuit(source, target, self.limits.circuit_bytes)
        self._circuits.add(circuit)
        return circuit

    def pass_bytes(self, circuit: Circuit[P], n_bytes: int) -> bool:
        """Count bytes that are about to pass; False if the circuit may not carry them."""
        if not circuit.spend(n_bytes):
            return False
        self.relayed_bytes += n_bytes
        return True

    def close(self, circuit: Circuit[P]) -> None:
        """A circuit has ended. Safe to call twice."""
        self._circuits.discard(circuit)

    def _circuits_of(self, source: P, target: P) -> tuple[int, int]:
        """Out of the one peer, and into the other."""
        out_of = Counter(circuit.source for circuit in self._circuits)
        into = Counter(circuit.target for circuit in self._circuits)
        return out_of[source], into[target]

    def _circuit_limit(self, out_of: int) -> str | None:
        """Which limit one more circuit of a caller with so many would be over."""
        limits = self.limits
        if len(self._circuits) >= limits.max_circuits:
            return limit_text(limits.max_circuits, limits.circuits_setting)
        if out_of >= limits.max_circuits_per_caller:
            return limit_text(limits.max_circuits_per_caller, limits.caller_setting)
        return None

    def _check_capacity(self, address: str) -> None:
        if len(self._reserved) >= self.limits.max_reservations:
            self._refuse(no_reservation_left(self.limits.max_reservations, self.limits.reservations_setting))
        from_there = sum(reserved.address == address for reserved in self._reserved.values())
        if _is_public(address) and from_there >= MAX_RESERVATIONS_PER_ADDRESS:
            words = f"this relay has {from_there} reservations from one address, the most it takes"
            self._refuse(RelayLimitError(words, limit_text(MAX_RESERVATIONS_PER_ADDRESS, "")))

    def _refuse(self, error: RelayLimitError) -> None:
        self.refused += 1
        if self._told.due(error.limit):
            logger.warning("Relay: a peer is refused: %s; %s", error, error.limit)
        raise error

    def _expire(self) -> None:
        now_s = self._clock()
        self._reserved = {held: reserved for held, reserved in self._reserved.items() if reserved.expires_s > now_s}


def _is_public(address: str) -> bool:
    """One's own network is not a stranger's."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
