"""How a node that nobody can dial stays within reach: it keeps a stream open to each of a few relays.

A relay that falls silent is replaced. When a caller comes through one, this node dials it while it dials this node
(both NATs then let the other in: B. Ford, P. Srisuresh and D. Kegel, "Peer-to-Peer Communication Across Network Address
Translators", USENIX 2005). Over UDP, as QUIC needs no agreement on who is client and who is server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common.errors import KilohiveError, UnavailableError
from common.seldom import Seldom
from common.tasks import repeat
from dht.relay.relaying import NOTE_EVERY_S, RELAY_PROTOCOL
from protocol import relay_pb2 as pb
from protocol.endpoints import MAX_RELAYS, is_udp_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dht.streams import Stream, Streams

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
SILENCE_S = 3 * NOTE_EVERY_S
LOOK_EVERY_S = 2.0
AVOID_S = 30.0
"""A relay that refused or fell silent is not asked again for so long."""

PUNCH_TRIES = 3
PUNCH_TIMEOUT_S = 2.0
PUNCH_PAUSE_S = 0.3
MAX_PUNCHING = 8


@dataclass(frozen=True)
class RelayOffer:
    """A peer that carries calls for others, and its multiaddress: for QUIC, or a lighthouse's for TCP."""

    peer_id: str
    address: str


class RelayLinks:
    """One node's connections with relays: over UDP if they can be, as only there a relay sees where to punch.

    `own_address` is where this node takes QUIC, for those who can dial it there.
    """

    def __init__(self, streams: Streams, own_address: str = "") -> None:
        self._streams = streams
        self.own_addresses = [own_address] if own_address else []
        self._tried: set[str] = set()

    async def open(self, offer: RelayOffer) -> Stream:
        """A stream to a relay. Raises UnavailableError."""
        if offer.peer_id not in self._tried and is_udp_address(offer.address):
            # Once: changing the connection ends every stream over it.
            self._tried.add(offer.peer_id)
            await self._prefer_udp(offer)
        elif offer.address and not is_udp_address(offer.address):
            await self._streams.dial(offer.peer_id, [offer.address], ASK_TIMEOUT_S)
        return await self._streams.open(offer.peer_id, RELAY_PROTOCOL, ASK_TIMEOUT_S)

    def forget(self) -> None:
        """Prefer UDP once more with every relay: all connections are gone."""
        self._tried.clear()

    async def _prefer_udp(self, offer: RelayOffer) -> None:
        seen = await self._streams.seen_at(offer.peer_id, ASK_TIMEOUT_S)
        if any(map(is_udp_address, seen)):
            return
        if seen:
            await self._streams.hang_up(offer.peer_id, ASK_TIMEOUT_S)
        try:
            await self._streams.dial(offer.peer_id, [offer.address], PUNCH_TIMEOUT_S)
        except UnavailableError as error:
            logger.debug("Relay %s cannot be dialled over UDP: %s", offer.peer_id, error)


class Reservations:
    """One node's relays, up to MAX_RELAYS. Belongs to the event loop.

    `changed` is called when `held` has. Relays are looked for while `wanted` is true, and left when it no longer is.
    """

    def __init__(
        self,
        streams: Streams,
        links: RelayLinks,
        offers: Callable[[], Sequence[RelayOffer]],
        changed: Callable[[], None],
        seed: str,
    ) -> None:
        self._streams, self._links, self._offers, self._changed = streams, links, offers, changed
        self._random = random.Random(seed)
        self._held: dict[str, asyncio.Task[None]] = {}
        self._avoided: dict[str, float] = {}
        self._punching: set[asyncio.Task[bool]] = set()
        self._helping: set[str] = set()
        self._told = Seldom()
        self.wanted = False

    @property
    def held(self) -> tuple[str, ...]:
        """Peer ids of the relays through which this node is reached; first those that help both ends to meet."""
        return tuple(sorted(self._held, key=lambda peer_id: peer_id not in self._helping))

    def start_over(self) -> None:
        """Ask every relay again: it was this node's own p2pd that ended the reservations, not the relays."""
        self._avoided.clear()
        self._links.forget()

    async def keep(self) -> None:
        """Reserve, and reserve elsewhere when a relay is gone, until cancelled."""
        await repeat(self._look, lambda: LOOK_EVERY_S, at_once=True)

    async def _look(self) -> None:
        if self.wanted:
            await self.reserve()
        else:
            await self.close()

    async def reserve(self) -> None:
        """Ask relays once for what is missing; none that refuses or does not answer is an error."""
        now_s = asyncio.get_running_loop().time()
        self._avoided = {peer_id: until_s for peer_id, until_s in self._avoided.items() if until_s > now_s}
        offers = [o for o in self._offers() if o.peer_id not in self._held and o.peer_id not in self._avoided]
        self._random.shuffle(offers)
        while offers and len(self._held) < MAX_RELAYS:
            helping = [] if self._helping else [offer for offer in offers if is_udp_address(offer.address)]
            offer = (helping or offers)[0]
            offers.remove(offer)
            await self._reserve_at(offer)

    async def _reserve_at(self, offer: RelayOffer) -> None:
        try:
            stream = await self._links.open(offer)
        except UnavailableError as error:
            self._avoid(offer.peer_id, error)
            return
        try:
            reserve = pb.ReserveRequest(addresses=self._links.own_addresses)
            await stream.send(pb.RelayRequest(reserve=reserve))
            granted(await stream.receive(pb.RelayResponse, ASK_TIMEOUT_S))
        except KilohiveError as error:
            stream.close()
            self._avoid(offer.peer_id, error)
            return
        if is_udp_address(offer.address):
            self._helping.add(offer.peer_id)
        listening = self._held[offer.peer_id] = asyncio.create_task(self._listen(stream), name="reservation")
        listening.add_done_callback(partial(self._left, stream))
        self._changed()

    def _avoid(self, peer_id: str, error: KilohiveError) -> None:
        full = isinstance(error, RelayFullError) and self._told.due(peer_id)
        logger.log(logging.WARNING if full else logging.DEBUG, "Relay %s: %s", peer_id, error)
        self._avoided[peer_id] = asyncio.get_running_loop().time() + AVOID_S

    async def _listen(self, stream: Stream) -> None:
        try:
            while True:
                note = await stream.receive(pb.RelayNote, SILENCE_S)
                if note.peer_id and len(self._punching) < MAX_PUNCHING:
                    self._punch(note.peer_id, list(note.addresses))
        except KilohiveError as error:
            self._avoid(stream.peer_id, error)

    def _left(self, stream: Stream, _: asyncio.Task[None]) -> None:
        """Called for a task that was cancelled before it began, too."""
        stream.close()
        self._held.pop(stream.peer_id, None)
        self._helping.discard(stream.peer_id)
        self._changed()

    def _punch(self, peer_id: str, addresses: list[str]) -> None:
        punching = asyncio.create_task(punch(self._streams, peer_id, addresses), name="punch")
        self._punching.add(punching)
        punching.add_done_callback(self._punching.discard)

    async def close(self) -> None:
        """Leave every relay; safe to call twice."""
        self.wanted = False
        tasks = [*self._held.values(), *self._punching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def granted(answer: pb.RelayResponse) -> pb.RelayResponse:
    """What a relay answers; UnavailableError if it refuses, RelayFullError if for a limit that it names."""
    if answer.problem and answer.limit:
        raise RelayFullError(f"the relay refuses: {answer.problem[:200]}; {answer.limit[:100]}")
    if answer.problem:
        raise UnavailableError(f"the relay refuses: {answer.problem[:200]}")
    return answer


class RelayFullError(UnavailableError):
    """A relay has reached a limit."""


async def punch(streams: Streams, peer_id: str, addresses: Sequence[str]) -> bool:
    """Dial a peer that dials this node at the same time; whether there is a direct connection now."""
    targets = [address for address in addresses if is_udp_address(address)]
    for _ in range(PUNCH_TRIES if targets else 0):
        try:
            await streams.dial(peer_id, targets, PUNCH_TIMEOUT_S)
        except UnavailableError as error:
            logger.debug("No direct way to %s yet: %s", peer_id, error)
        if await _is_connected(streams, peer_id):
            return True
        await asyncio.sleep(PUNCH_PAUSE_S)
    return await _is_connected(streams, peer_id)


async def _is_connected(streams: Streams, peer_id: str) -> bool:
    try:
        return bool(await streams.seen_at(peer_id, ASK_TIMEOUT_S))
    except UnavailableError:
        return False
