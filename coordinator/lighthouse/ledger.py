"""What a relay has promised and to whom: reservations and circuits within their limits. Pure; `relay.py` acts on it."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from protocol.errors import OverloadedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RESERVATION_S = 3600.0
"""A reservation's life; peers renew theirs long before."""

MAX_RESERVATIONS_PER_ADDRESS = 16
"""Peers behind one public address: more than a household has, and not enough to take all."""

MAX_CIRCUITS_PER_PEER = 16
"""Into one peer, and out of one peer."""


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """What a lighthouse's owner gives away. `circuit_bytes` counts both ways together."""

    reservations: int
    circuits: int
    circuit_bytes: int
    circuit_s: float


class _Reserved(NamedTuple):
    expires_s: float
    address: str


class Circuit:
    """One circuit's account."""

    def __init__(self, source: bytes, target: bytes, max_bytes: int) -> None:
        self.source, self.target = source, target
        self.left_bytes = max_bytes

    def spend(self, n_bytes: int) -> bool:
        """Whether so many bytes more may pass; if so, they are counted."""
        if n_bytes > self.left_bytes:
            return False
        self.left_bytes -= n_bytes
        return True


class Ledger:
    """Reservations and circuits of one relay; `clock` gives seconds since 1970."""

    def __init__(self, limits: RelayLimits, clock: Callable[[], float]) -> None:
        self.limits, self._clock = limits, clock
        self._reserved: dict[bytes, _Reserved] = {}
        self._circuits: set[Circuit] = set()
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

    def reserve(self, peer: bytes, address: str) -> float:
        """Reserve for a peer that is connected from `address`, or renew; until when. Raises OverloadedError."""
        self._expire()
        if peer not in self._reserved:
            self._check_room(address)
        self._reserved[peer] = _Reserved(self._clock() + RESERVATION_S, address)
        return self._reserved[peer].expires_s

    def has_reserved(self, peer: bytes) -> bool:
        """Whether a peer's reservation holds."""
        return peer in self._reserved and self._reserved[peer].expires_s > self._clock()

    def keep_only(self, connected: Iterable[bytes]) -> None:
        """Drop reservations of peers that have left: nobody can be led to them."""
        here = set(connected)
        self._reserved = {peer: reserved for peer, reserved in self._reserved.items() if peer in here}

    def open(self, source: bytes, target: bytes) -> Circuit:
        """Open a circuit. Raises UnavailableError if the target has no reservation, OverloadedError at a limit."""
        self._expire()
        if target not in self._reserved:
            raise UnavailableError("relay: the peer has no reservation here")
        if len(self._circuits) >= self.limits.circuits:
            self._refuse("relay: all circuits are taken")
        if self._busiest(source, target) >= MAX_CIRCUITS_PER_PEER:
            self._refuse("relay: the peer has too many circuits")
        circuit = Circuit(source, target, self.limits.circuit_bytes)
        self._circuits.add(circuit)
        return circuit

    def pass_bytes(self, circuit: Circuit, n_bytes: int) -> bool:
        """Count bytes that are about to pass; False if the circuit may not carry them."""
        if not circuit.spend(n_bytes):
            return False
        self.relayed_bytes += n_bytes
        return True

    def close(self, circuit: Circuit) -> None:
        """A circuit has ended. Safe to call twice."""
        self._circuits.discard(circuit)

    def _busiest(self, source: bytes, target: bytes) -> int:
        out = Counter(circuit.source for circuit in self._circuits)
        into = Counter(circuit.target for circuit in self._circuits)
        return max(out[source], into[target])

    def _check_room(self, address: str) -> None:
        if len(self._reserved) >= self.limits.reservations:
            self._refuse("relay: all reservations are taken")
        from_there = sum(reserved.address == address for reserved in self._reserved.values())
        if _is_public(address) and from_there >= MAX_RESERVATIONS_PER_ADDRESS:
            self._refuse("relay: too many reservations from one address")

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        raise OverloadedError(reason)

    def _expire(self) -> None:
        now_s = self._clock()
        self._reserved = {peer: reserved for peer, reserved in self._reserved.items() if reserved.expires_s > now_s}


def _is_public(address: str) -> bool:
    """One's own network is not a stranger's."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
