"""Carries calls to nodes that nobody can dial, as `dht/relay/relay.py` does, with the quotas of libp2p's circuits.

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
from protocol import relay_pb2 as pb
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from coordinator.lighthouse.relay_quotas import Circuit, RelayQuotas
    from coordinator.lighthouse.streams import TrioStream
    from coordinator.lighthouse.transport import TrioTransport

logger = logging.getLogger(__name__)


class _Reservation:
    """A node that is reached through its stream, and where it says that it may be dialled."""

    def __init__(self, stream: TrioStream, told: Iterable[str]) -> None:
        self.stream, self.told = stream, tuple(told)
        self._one_at_a_time = trio.Lock()

    async def note(self, note: pb.RelayNote) -> None:
        """Tell the node something; raises UnavailableError."""
        async with self._one_at_a_time:
            await _send(self.stream, note)


class NodeRelay:
    """Serves RELAY_PROTOCOL within the ledger's limits."""

    def __init__(self, transport: TrioTransport, quotas: RelayQuotas) -> None:
        self._transport, self._quotas = transport, quotas
        self._reserved: dict[str, _Reservation] = {}
        transport.handle(relaying.RELAY_PROTOCOL, self._serve)

    async def _serve(self, stream: TrioStream) -> None:
        request = await _request(stream)
        try:
            await self._grant(stream, request)
        except KilohiveError as error:
            logger.debug("relay: refused: %s", error)
            await _last(stream, pb.RelayResponse(problem=str(error)))

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
        self._quotas.reserve(stream.peer, stream.address, "kilohive")
        reservation = _Reservation(stream, request.addresses[: relaying.MAX_ADDRESSES])
        self._reserved[stream.peer_id] = reservation
        try:
            await _send(stream, pb.RelayResponse())
            await self._until_it_leaves(reservation)
        finally:
            if self._reserved.get(stream.peer_id) is reservation:  # it has not reserved again
                del self._reserved[stream.peer_id]
                self._quotas.release(stream.peer, "kilohive")

    async def _until_it_leaves(self, reservation: _Reservation) -> None:
        """A holder says nothing more: anything to be read, the end too, ends the reservation."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_alive, reservation, nursery.cancel_scope)
            with contextlib.suppress(UnavailableError):
                await reservation.stream.read(1)
            nursery.cancel_scope.cancel()

    async def _say_alive(self, reservation: _Reservation, both: trio.CancelScope) -> None:
        stream = reservation.stream
        try:
            while True:
                await reservation.note(pb.RelayNote())
                await trio.sleep(relaying.NOTE_EVERY_S)
                self._quotas.reserve(stream.peer, stream.address, "kilohive")
        except KilohiveError as error:
            logger.debug("relay: a reservation has ended: %s", error)
            both.cancel()

    async def _connect(self, stream: TrioStream, request: pb.ConnectRequest) -> None:
        reservation = self._reserved.get(request.peer_id)
        if reservation is None:
            raise relaying.not_reached(request.peer_id)
        circuit = self._quotas.open(stream.peer, reservation.stream.peer, "kilohive")
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

    async def _reach(self, reservation: _Reservation) -> TrioStream:
        with trio.move_on_after(relaying.OPEN_TIMEOUT_S):
            return await self._transport.open_stream(reservation.stream.peer, relaying.TUNNEL_PROTOCOL)
        raise UnavailableError(f"{reservation.stream.peer_id} does not answer")

    async def _introduce(self, stream: TrioStream, reservation: _Reservation, told: Iterable[str]) -> None:
        """Tell each side where the other may be dialled."""
        await reservation.note(pb.RelayNote(peer_id=stream.peer_id, addresses=_places(stream, told)))
        # Last: after it come the other side's bytes, and no refusal.
        await _send(stream, pb.RelayResponse(addresses=_places(reservation.stream, reservation.told)))

    async def _carry(self, source: TrioStream, target: TrioStream, circuit: Circuit) -> bool:
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
