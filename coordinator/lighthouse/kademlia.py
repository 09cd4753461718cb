"""libp2p's own DHT, as much of it as tells who is where: hivemind names peers by id, p2pd finds their addresses here.

Only FIND_NODE and PING are answered, from the connections that there are. Nothing is stored: py-libp2p's own KadDHT
keeps whatever strangers put there.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import TYPE_CHECKING

import trio

from common.errors import InvalidInputError, UnavailableError
from coordinator.lighthouse.libp2p_pb2 import KademliaMessage, KademliaPeer
from coordinator.lighthouse.wire import framed, read_message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.lighthouse.relay import CircuitRelay
    from coordinator.lighthouse.streams import TrioStream
    from coordinator.lighthouse.transport import TrioTransport

PROTOCOL = "/ipfs/kad/1.0.0"
N_CLOSER = 20
MAX_MESSAGE_BYTES = 64 << 10
"""The size of an answer with 20 peers; a request is a tenth of a kilobyte."""

MAX_KEY_BYTES = 128
N_ASKED = 4
ASK_TIMEOUT_S = 1.5
IDLE_TIMEOUT_S = 60.0
"""p2pd asks again and again on one stream."""

_CONNECTED = 1


class Kademlia:
    """Serves FIND_NODE and PING, and asks others for addresses."""

    def __init__(self, transport: TrioTransport, relay: CircuitRelay) -> None:
        self._transport, self._relay = transport, relay
        self.served = 0
        transport.handle(PROTOCOL, self._serve)

    async def addresses_of(self, peer: bytes) -> list[bytes]:
        """A peer's addresses: its own word if it has been here, else what those nearest to it say; may be empty."""
        known = self._transport.addresses_of(peer)
        if known:
            return known
        for other in nearest(peer, self._transport.connected, N_ASKED):
            found = await self._ask(other, peer)
            if found:
                return found
        return []

    async def _ask(self, other: bytes, peer: bytes) -> list[bytes]:
        request = KademliaMessage(kind=KademliaMessage.FIND_NODE, key=peer)
        try:
            with trio.move_on_after(ASK_TIMEOUT_S):
                stream = await self._transport.open_stream(other, PROTOCOL)
                try:
                    await stream.write(framed(request))
                    answer = await read_message(stream.read, KademliaMessage, MAX_MESSAGE_BYTES)
                finally:
                    await stream.reset()
                return next((list(found.addresses) for found in answer.closer_peers if found.id == peer), [])
        except (UnavailableError, InvalidInputError):
            pass
        return []

    async def _serve(self, stream: TrioStream) -> None:
        while True:
            with trio.move_on_after(IDLE_TIMEOUT_S) as limit:
                try:
                    request = await read_message(stream.read, KademliaMessage, MAX_MESSAGE_BYTES)
                except InvalidInputError:  # the end of the stream, for one
                    return
                await stream.write(framed(self._answer(request, stream.peer)))
                self.served += 1
            if limit.cancelled_caught:
                return

    def _answer(self, request: KademliaMessage, caller: bytes) -> KademliaMessage:
        if request.kind == KademliaMessage.PING:
            return KademliaMessage(kind=KademliaMessage.PING)
        if request.kind != KademliaMessage.FIND_NODE or not 0 < len(request.key) <= MAX_KEY_BYTES:
            raise UnavailableError("kademlia: only FIND_NODE and PING are answered here")
        here = self._here(request.key, caller)
        peers = [
            KademliaPeer(id=peer, addresses=here[peer], connection=_CONNECTED)
            for peer in nearest(request.key, here, N_CLOSER)
        ]
        return KademliaMessage(kind=KademliaMessage.FIND_NODE, key=request.key, closer_peers=peers)

    def _here(self, key: bytes, caller: bytes) -> dict[bytes, list[bytes]]:
        """Addresses of peers that are connected, those through this relay too."""
        if key == self._transport.me:  # so p2pd finds out whether this is a member, and takes no answer for a no
            return {key: [address.to_bytes() for address in self._transport.addresses]}
        others = [peer for peer in self._transport.connected if peer != caller]
        found = {peer: self._transport.addresses_of(peer) + self._relay.addresses_of(peer) for peer in others}
        return {peer: addresses for peer, addresses in found.items() if addresses}


def nearest(key: bytes, peers: Iterable[bytes], n_peers: int) -> list[bytes]:
    """Return the peers whose hash is nearest to that of `key`."""
    wanted = _place(key)
    return heapq.nsmallest(n_peers, peers, key=lambda peer: _place(peer) ^ wanted)


def _place(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest())
