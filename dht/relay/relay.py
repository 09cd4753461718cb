"""Carries calls to peers that nobody can dial: they have dialled this node, and it passes streams on to them.

What passes is gRPC over TLS between the two ends, so a relay reads nothing and can forge nothing; it can only stop. A
peer that reserves is told of each caller, so that both can dial at once and go on without the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from common.errors import KilohiveError, UnavailableError
from dht.relay.quotas import RelayLimits, RelayQuotas
from dht.relay.relaying import (
    IDLE_S,
    MAX_ADDRESSES,
    NOTE_EVERY_S,
    OPEN_TIMEOUT_S,
    RELAY_PROTOCOL,
    REQUEST_TIMEOUT_S,
    TUNNEL_PROTOCOL,
    not_what_is_wanted,
    places,
    refusal,
)
from dht.relay.reservation_table import Reservation, ReservationTable
from dht.streams import Stream, splice
from protocol import relay_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.streams import Streams

logger = logging.getLogger(__name__)


class Relay:
    """One node's service to those behind a NAT. Belongs to the event loop."""

    def __init__(self, streams: Streams, limits: RelayLimits) -> None:
        self._streams = streams
        self._quotas = RelayQuotas[str](limits, time.monotonic)
        self._table = ReservationTable[str, Reservation[str, Stream]](self._quotas)

    @property
    def reservations(self) -> int:
        """Peers that are reached through this node."""
        return len(self._table)

    @property
    def circuits(self) -> int:
        """Open now."""
        return self._quotas.n_circuits

    @property
    def carried_bytes(self) -> int:
        """Over all circuits, both ways together."""
        return self._quotas.relayed_bytes

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
                await stream.last(refusal(error))
            raise

    async def _reserve(self, stream: Stream, request: pb.ReserveRequest) -> None:
        reservation = Reservation(stream, request.addresses, peer=stream.peer_id)
        self._table.take(reservation)
        try:
            await stream.send(pb.RelayResponse())
            await self._until_it_leaves(reservation)
        finally:
            self._table.drop(reservation)

    async def _until_it_leaves(self, reservation: Reservation[str, Stream]) -> None:
        """A holder says nothing more: anything to be read, the end too, ends the reservation."""
        stream = reservation.stream
        leaving = asyncio.create_task(stream.reader.read(1), name="reservation")
        try:
            while not leaving.done():
                await stream.send(pb.RelayNote())
                await asyncio.wait({leaving}, timeout=NOTE_EVERY_S)
                self._table.renew(reservation)
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _connect(self, stream: Stream, request: pb.ConnectRequest) -> None:
        reservation, circuit = self._table.connect(stream.peer_id, request.peer_id)

        def count(n_bytes: int) -> None:
            self._quotas.pass_bytes(circuit, n_bytes)

        try:
            target = await self._streams.open(request.peer_id, TUNNEL_PROTOCOL, OPEN_TIMEOUT_S)
            with contextlib.closing(target):
                await self._introduce(stream, reservation, list(request.addresses))
                await splice(stream, target, IDLE_S, count)
        finally:
            self._quotas.close(circuit)

    async def _introduce(self, stream: Stream, reservation: Reservation[str, Stream], told: Sequence[str]) -> None:
        """Tell each side where the other may be dialled."""
        target = reservation.stream
        await stream.send(pb.RelayResponse(addresses=await self._places(target.peer_id, reservation.told)))
        note = pb.RelayNote(peer_id=stream.peer_id, addresses=await self._places(stream.peer_id, told))
        await target.send(note)

    async def _places(self, peer_id: str, told: Sequence[str]) -> list[str]:
        return places(await self._streams.seen_at(peer_id, OPEN_TIMEOUT_S), told[:MAX_ADDRESSES])
