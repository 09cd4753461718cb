"""Carries calls to nodes that nobody can dial, within the quotas that libp2p's circuits have too.

What is granted is decided where a node's relay decides it, in `dht/relay/`; here is what sends and waits, on trio.

py-libp2p has TCP only: here a peer is seen at no address where others could meet it over QUIC. What it says of itself
is passed on, if that is at the IP address that it is seen at.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import trio

from common.errors import InvalidInputError, KilohiveError, UnavailableError
from coordinator.lighthouse.circuits import Account, carry
from dht import framing
from dht.relay import relaying
from dht.relay.reservation_table import Reservation, ReservationTable
from protocol import relay_pb2 as pb
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from coordinator.lighthouse.streams import TrioStream
    from coordinator.lighthouse.transport import TrioTransport
    from dht.relay.quotas import Circuit, RelayQuotas

logger = logging.getLogger(__name__)


class _Held(Reservation[bytes, "TrioStream"]):
    """A node's reservation, whose stream takes one note at a time."""

    def __init__(self, stream: TrioStream, told: Iterable[str]) -> None:
        super().__init__(stream, told, peer=stream.peer, address=stream.address)
        self._one_at_a_time = trio.Lock()

    async def note(self, note: pb.RelayNote) -> None:
        """Tell the node something; raises UnavailableError."""
        async with self._one_at_a_time:
            await _send(self.stream, note)


class NodeRelay:
    """Serves RELAY_PROTOCOL within its quotas."""

    def __init__(self, transport: TrioTransport, quotas: RelayQuotas[bytes]) -> None:
        self._transport, self._quotas = transport, quotas
        self._table = ReservationTable[bytes, _Held](quotas)
        transport.handle(relaying.RELAY_PROTOCOL, self._serve)

    async def _serve(self, stream: TrioStream) -> None:
        request = await _request(stream)
        try:
            await self._grant(stream, request)
        except KilohiveError as error:
            logger.debug("relay: refused: %s", error)
            await _last(stream, relaying.refusal(error))

    async def _grant(self, stream: TrioStream, request: pb.RelayRequest) -> None:
        wanted = request.WhichOneof("wanted")
        if wanted == "reserve":
            await self._reserve(stream, request.reserve)
        elif wanted == "connect":
            await self._connect(stream, request.connect)
        else:
            raise relaying.not_what_is_wanted()

    async def _reserve(self, stream: TrioStream, request: pb.ReserveRequest) -> None:
        self._quotas.keep_only(self._transport.connected)
        reservation = _Held(stream, request.addresses)
        self._table.take(reservation)
        try:
            await _send(stream, pb.RelayResponse())
            await self._until_it_leaves(reservation)
        finally:
            self._table.drop(reservation)

    async def _until_it_leaves(self, reservation: _Held) -> None:
        """A holder says nothing more: anything to be read, the end too, ends the reservation."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_alive, reservation, nursery.cancel_scope)
            with contextlib.suppress(UnavailableError):
                await reservation.stream.read(1)
            nursery.cancel_scope.cancel()

    async def _say_alive(self, reservation: _Held, both: trio.CancelScope) -> None:
        try:
            while True:
                await reservation.note(pb.RelayNote())
                await trio.sleep(relaying.NOTE_EVERY_S)
                self._table.renew(reservation)
        except KilohiveError as error:
            logger.debug("relay: a reservation has ended: %s", error)
            both.cancel()

    async def _connect(self, stream: TrioStream, request: pb.ConnectRequest) -> None:
        reservation, circuit = self._table.connect(stream.peer, request.peer_id)
        try:
            target = await self._reach(reservation)
            whole = False
            try:
                await self._introduce(stream, reservation, request.addresses)
                whole = await self._carry(stream, target, circuit)
            finally:
                await (target.close() if whole else target.reset())
        finally:
            self._quotas.close(circuit)

    async def _reach(self, reservation: _Held) -> TrioStream:
        with trio.move_on_after(relaying.OPEN_TIMEOUT_S):
            return await self._transport.open_stream(reservation.stream.peer, relaying.TUNNEL_PROTOCOL)
        raise UnavailableError(f"{reservation.stream.peer_id} does not answer")

    async def _introduce(self, stream: TrioStream, reservation: _Held, told: Iterable[str]) -> None:
        """Tell each side where the other may be dialled."""
        await reservation.note(pb.RelayNote(peer_id=stream.peer_id, addresses=_places(stream, told)))
        # Last: after it come the other side's bytes, and no refusal.
        await _send(stream, pb.RelayResponse(addresses=_places(reservation.stream, reservation.told)))

    async def _carry(self, source: TrioStream, target: TrioStream, circuit: Circuit[bytes]) -> bool:
        """Whether both ends have ended it."""
        whole = await carry(source, target, Account(self._quotas, circuit, relaying.IDLE_S))
        if not whole:
            await source.reset()
        return whole


def _places(stream: TrioStream, told: Iterable[str]) -> list[str]:
    return relaying.places([stream.seen_at] if stream.seen_at else [], list(told)[: relaying.MAX_ADDRESSES])


async def _request(stream: TrioStream) -> pb.RelayRequest:
    """What a peer wants; raises UnavailableError when it says nothing, or nothing that makes sense."""
    with trio.move_on_after(relaying.REQUEST_TIMEOUT_S):
        try:
            length = framing.length_in(await stream.read_exactly(framing.LENGTH_BYTES))
            return parse_message(pb.RelayRequest, await stream.read_exactly(length))
        except InvalidInputError as error:
            raise UnavailableError(f"relay: {error}") from None
    raise UnavailableError(f"relay: said nothing for {relaying.REQUEST_TIMEOUT_S:g} s")


async def _send(stream: TrioStream, message: Message) -> None:
    with trio.move_on_after(framing.SEND_TIMEOUT_S):
        await stream.write(framing.packed(message))
        return
    raise UnavailableError(f"relay: takes nothing for {framing.SEND_TIMEOUT_S:g} s")


async def _last(stream: TrioStream, message: Message) -> None:
    """Send what nothing follows; the other end closes, as p2pd drops what is sent just before a close."""
    await _send(stream, message)
    with trio.move_on_after(framing.SEND_TIMEOUT_S):
        await stream.read(1)
