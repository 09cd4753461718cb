"""Circuit relay v2: peers that nobody can dial are called through a connection that they keep to this relay.

Written here rather than taken from py-libp2p, whose relay believes the peer id in a reservation's message, ends both
directions of a circuit with the first, and counts no circuits. What passes is encrypted between the two peers.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from common.errors import InvalidInputError, OverloadedError, UnavailableError
from coordinator.lighthouse.circuits import Account, carry
from coordinator.lighthouse.libp2p_pb2 import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    UNEXPECTED_MESSAGE,
    CircuitLimit,
    CircuitPeer,
    HopMessage,
    Reservation,
    Status,
    StopMessage,
)
from coordinator.lighthouse.wire import framed, read_message

if TYPE_CHECKING:
    from coordinator.lighthouse.streams import TrioStream
    from coordinator.lighthouse.transport import TrioTransport
    from dht.relay.quotas import Circuit, RelayQuotas

logger = logging.getLogger(__name__)

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"

MAX_MESSAGE_BYTES = 4096
MESSAGE_TIMEOUT_S = 10.0


class CircuitRelay:
    """Serves reservations and circuits within its quotas."""

    def __init__(self, transport: TrioTransport, quotas: RelayQuotas[bytes]) -> None:
        self._transport, self._quotas = transport, quotas
        limits = quotas.limits
        self._limit = CircuitLimit(duration_s=math.ceil(limits.circuit_s), data_bytes=limits.circuit_bytes)
        transport.handle(HOP, self._serve)

    def addresses_of(self, peer: bytes) -> list[bytes]:
        """Where a peer with a reservation is reached through this relay."""
        if not self._quotas.has_reserved(peer):
            return []
        return [address.encapsulate("/p2p-circuit").to_bytes() for address in self._transport.addresses]

    def forget_the_gone(self) -> None:
        """Drop reservations of peers without a connection."""
        self._quotas.keep_only(self._transport.connected)

    async def _serve(self, stream: TrioStream) -> None:
        with trio.move_on_after(MESSAGE_TIMEOUT_S) as limit:
            try:
                message = await read_message(stream.read, HopMessage, MAX_MESSAGE_BYTES)
            except InvalidInputError:
                await _refuse(stream, MALFORMED_MESSAGE)
                return
        if limit.cancelled_caught:
            raise UnavailableError("relay: said nothing")
        if message.kind == HopMessage.RESERVE and message.HasField("kind"):
            await self._reserve(stream, message)
        elif message.kind == HopMessage.CONNECT:
            await self._connect(stream, message.peer.id)
        else:
            await _refuse(stream, UNEXPECTED_MESSAGE)

    async def _reserve(self, stream: TrioStream, message: HopMessage) -> None:
        if message.peer.id and message.peer.id != stream.peer:
            await _refuse(stream, PERMISSION_DENIED)
            return
        self.forget_the_gone()
        try:
            expires_s = self._quotas.reserve(stream.peer, stream.address)
        except OverloadedError:
            await _refuse(stream, RESERVATION_REFUSED)
            return
        addresses = [address.to_bytes() for address in self._transport.addresses]
        reservation = Reservation(expire_s=int(expires_s), addresses=addresses)
        await _answer(stream, HopMessage(kind=HopMessage.STATUS, status=OK, reservation=reservation, limit=self._limit))

    async def _connect(self, source: TrioStream, target: bytes) -> None:
        self.forget_the_gone()
        try:
            circuit = self._quotas.open(source.peer, target)
        except UnavailableError:
            await _refuse(source, NO_RESERVATION)
            return
        except OverloadedError:
            await _refuse(source, RESOURCE_LIMIT_EXCEEDED)
            return
        try:
            await self._carry(source, circuit)
        finally:
            self._quotas.close(circuit)

    async def _carry(self, source: TrioStream, circuit: Circuit[bytes]) -> None:
        try:
            target = await self._reach(circuit)
        except (UnavailableError, InvalidInputError) as error:
            logger.debug("relay: %s", error)
            await _refuse(source, CONNECTION_FAILED)
            return
        whole = False
        try:
            await _answer(source, HopMessage(kind=HopMessage.STATUS, status=OK, limit=self._limit))
            whole = await carry(source, target, Account(self._quotas, circuit))
        finally:
            for stream in (source, target):
                await (stream.close() if whole else stream.reset())

    async def _reach(self, circuit: Circuit[bytes]) -> TrioStream:
        """The target's end of a circuit, once it has agreed."""
        request = StopMessage(kind=StopMessage.CONNECT, peer=CircuitPeer(id=circuit.source), limit=self._limit)
        with trio.move_on_after(MESSAGE_TIMEOUT_S):
            stream = await self._transport.open_stream(circuit.target, STOP)
            try:
                await stream.write(framed(request))
                answer = await read_message(stream.read, StopMessage, MAX_MESSAGE_BYTES)
                _check_agreed(answer)
            except BaseException:  # cancelled, too: no stream stays
                await stream.reset()
                raise
            return stream
        raise UnavailableError("the target did not answer")


def _check_agreed(answer: StopMessage) -> None:
    if answer.status != OK:
        raise UnavailableError(f"the target refused with status {answer.status}")


async def _refuse(stream: TrioStream, status: Status) -> None:
    await _answer(stream, HopMessage(kind=HopMessage.STATUS, status=status))


async def _answer(stream: TrioStream, message: HopMessage) -> None:
    with trio.move_on_after(MESSAGE_TIMEOUT_S) as limit:
        await stream.write(framed(message))
    if limit.cancelled_caught:
        raise UnavailableError("relay: takes no answer")
