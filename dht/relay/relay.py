"""Carries calls to peers that nobody can dial: they have dialled this node, and it passes streams on to them.

What passes is gRPC over TLS between the two ends, so a relay reads nothing and can forge nothing; it can only stop. A
peer that reserves is told of each caller, so that both can dial at once and go on without the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from common.errors import KilohiveError, UnavailableError
from dht.relay.relaying import (
    IDLE_S,
    MAX_ADDRESSES,
    NOTE_EVERY_S,
    OPEN_TIMEOUT_S,
    RELAY_PROTOCOL,
    REQUEST_TIMEOUT_S,
    TUNNEL_PROTOCOL,
    no_circuit_left,
    no_reservation_left,
    not_reached,
    not_what_is_wanted,
    places,
)
from dht.streams import Stream, splice
from protocol import relay_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.streams import Streams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """How much a node carries for others: peers that reserve, open circuits in all and for one caller."""

    max_reservations: int = 32
    max_circuits: int = 64
    max_circuits_per_caller: int = 16


class _Reservation(NamedTuple):
    """A peer that is reached through its stream, and where it says that it may be dialled."""

    stream: Stream
    told: tuple[str, ...]


class Relay:
    """One node's service to those behind a NAT. Belongs to the event loop."""

    def __init__(self, streams: Streams, limits: RelayLimits) -> None:
        self._streams, self._limits = streams, limits
        self._reserved: dict[str, _Reservation] = {}
        self._circuits: Counter[str] = Counter()
        self.carried_bytes = 0

    @property
    def reservations(self) -> int:
        """Peers that are reached through this node."""
        return len(self._reserved)

    @property
    def circuits(self) -> int:
        """Open now."""
        return self._circuits.total()

    async def start(self) -> None:
        """Serve until the node's streams are closed. Raises UnavailableError."""
        await self._streams.serve(RELAY_PROTOCOL, self._answer)

    async def _answer(self, stream: Stream) -> None:
        request = await stream.receive(pb.RelayRequest, REQUEST_TIMEOUT_S)
        wanted = request.WhichOneof("wanted")
        try:
            if wanted == "reserve":
                await self._reserve(stream, request.reserve)
            elif wanted == "connect":
                await self._connect(stream, request.connect)
            else:
                raise not_what_is_wanted()
        except KilohiveError as error:
            with contextlib.suppress(UnavailableError):
                await stream.last(pb.RelayResponse(problem=str(error)))
            raise

    async def _reserve(self, stream: Stream, request: pb.ReserveRequest) -> None:
        if len(self._reserved) >= self._limits.max_reservations and stream.peer_id not in self._reserved:
            raise no_reservation_left(self._limits.max_reservations)
        self._reserved[stream.peer_id] = _Reservation(stream, tuple(request.addresses[:MAX_ADDRESSES]))
        try:
            await stream.send(pb.RelayResponse())
            await self._until_it_leaves(stream)
        finally:
            held = self._reserved.get(stream.peer_id)
            if held is not None and held.stream is stream:
                del self._reserved[stream.peer_id]

    async def _until_it_leaves(self, stream: Stream) -> None:
        """A holder says nothing more: anything to be read, the end too, ends the reservation."""
        leaving = asyncio.create_task(stream.reader.read(1), name="reservation")
        try:
            while not leaving.done():
                await stream.send(pb.RelayNote())
                await asyncio.wait({leaving}, timeout=NOTE_EVERY_S)
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _connect(self, stream: Stream, request: pb.ConnectRequest) -> None:
        caller, target_id = stream.peer_id, request.peer_id
        reservation = self._reserved.get(target_id)
        if reservation is None:
            raise not_reached(target_id)
        limits = self._limits
        if self.circuits >= limits.max_circuits or self._circuits[caller] >= limits.max_circuits_per_caller:
            raise no_circuit_left(self.circuits, self._circuits[caller])
        self._circuits[caller] += 1
        try:
            target = await self._streams.open(target_id, TUNNEL_PROTOCOL, OPEN_TIMEOUT_S)
            with contextlib.closing(target):
                await self._introduce(stream, reservation, list(request.addresses))
                await splice(stream, target, IDLE_S, self._count)
        finally:
            self._circuits[caller] -= 1
            if not self._circuits[caller]:
                del self._circuits[caller]

    async def _introduce(self, stream: Stream, reservation: _Reservation, told: Sequence[str]) -> None:
        """Tell each side where the other may be dialled."""
        target = reservation.stream
        await stream.send(pb.RelayResponse(addresses=await self._places(target.peer_id, reservation.told)))
        note = pb.RelayNote(peer_id=stream.peer_id, addresses=await self._places(stream.peer_id, told))
        await target.send(note)

    async def _places(self, peer_id: str, told: Sequence[str]) -> list[str]:
        return places(await self._streams.seen_at(peer_id, OPEN_TIMEOUT_S), told[:MAX_ADDRESSES])

    def _count(self, n_bytes: int) -> None:
        self.carried_bytes += n_bytes
