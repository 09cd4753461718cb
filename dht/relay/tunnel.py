"""Calls to a node that nobody can dial: a port on this machine whose connections end at that node's server.

A connection goes over the direct connection that p2pd has with the node, if there is one, and through one of its relays
otherwise. Through a relay both ends try to meet directly; once they have, the connections that went through the relay
are closed at a quiet moment, and whoever used them connects again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple

from common.errors import KilohiveError, UnavailableError
from common.seldom import Seldom
from common.tasks import until_one_ends
from dht.relay.relaying import IDLE_S, TUNNEL_PROTOCOL
from dht.relay.reservations import RelayFullError, granted, punch
from dht.streams import Stream, splice
from protocol import relay_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from dht.relay.reservations import RelayLinks, RelayOffer
    from dht.streams import Streams

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LINK_TIMEOUT_S = 5.0
DIRECT_TIMEOUT_S = 2.0
UNUSED_S = 60.0
"""A port without connections is closed after so long."""

QUIET_S = 0.1
MOVE_WITHIN_S = 10.0
"""A relayed connection that is never quiet is closed after so long; its calls are repeated."""

PUNCH_AGAIN_S = 60.0
MAX_TUNNELS = 256


class Tunnels:
    """One node's ways to those that it cannot dial; `offer_of` finds a relay. Belongs to the event loop."""

    def __init__(self, streams: Streams, links: RelayLinks, offer_of: Callable[[str], RelayOffer]) -> None:
        self._ways = _Ways(streams, links, offer_of, Seldom())
        self._open: dict[str, _Tunnel] = {}

    async def endpoint(self, peer_id: str, relays: tuple[str, ...]) -> str:
        """host:port on this machine that leads to a peer's server. Raises UnavailableError with too many open."""
        tunnel = self._open.get(peer_id)
        if tunnel is None or tunnel.closed:
            self._open = {other: tunnel for other, tunnel in self._open.items() if not tunnel.closed}
            if len(self._open) >= MAX_TUNNELS:
                raise UnavailableError(f"this node has {MAX_TUNNELS} tunnels open, the most it takes")
            tunnel = self._open[peer_id] = _Tunnel(peer_id, self._ways)
        tunnel.relays = relays
        return await tunnel.endpoint()

    async def close(self) -> None:
        """Close every port and connection; safe to call twice."""
        await asyncio.gather(*(tunnel.close() for tunnel in self._open.values()))


class _Ways(NamedTuple):
    """What all tunnels of a node use."""

    streams: Streams
    links: RelayLinks
    offer_of: Callable[[str], RelayOffer]
    told: Seldom


class _Tunnel:
    """A tunnel to one peer."""

    def __init__(self, peer_id: str, ways: _Ways) -> None:
        self._peer_id, self._ways, self._streams = peer_id, ways, ways.streams
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()
        self._links: set[asyncio.Task[None]] = set()
        self._relayed: set[_Relayed] = set()
        self._punching: asyncio.Task[None] | None = None
        self._punch_after_s = 0.0
        self._closing: asyncio.TimerHandle | None = None
        self.relays: tuple[str, ...] = ()
        self.closed = False

    async def endpoint(self) -> str:
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._connected, LOOPBACK, 0)
        self._close_when_unused()
        return f"{LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self.closed = True
        if self._closing is not None:
            self._closing.cancel()
        if self._server is not None:
            self._server.close()
        tasks = [*self._links, *([self._punching] if self._punching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.create_task(self._link(Stream("this node", reader, writer)), name=f"tunnel to {self._peer_id}")
        self._links.add(link)
        link.add_done_callback(self._ended)

    def _ended(self, link: asyncio.Task[None]) -> None:
        self._links.discard(link)
        if not self.closed:
            self._close_when_unused()

    def _close_when_unused(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._closing = asyncio.get_running_loop().call_later(UNUSED_S, self._close_if_unused)

    def _close_if_unused(self) -> None:
        if not self._links and self._server is not None:
            self.closed = True
            self._server.close()

    async def _link(self, local: Stream) -> None:
        with contextlib.closing(local):
            try:
                await self._carry(local)
            except UnavailableError as error:
                logger.debug("No way to %s: %s", self._peer_id, error)

    async def _carry(self, local: Stream) -> None:
        far = await self._directly()
        if far is not None:
            await splice(local, far, IDLE_S)
            return
        relayed = _Relayed(local, await self._through_a_relay())
        self._relayed.add(relayed)
        try:
            await relayed.carry()
        finally:
            self._relayed.discard(relayed)

    async def _directly(self) -> Stream | None:
        """Over a connection that there is; to make one is for `punch`, as p2pd avoids addresses that failed."""
        try:
            if await self._streams.seen_at(self._peer_id, DIRECT_TIMEOUT_S):
                return await self._streams.open(self._peer_id, TUNNEL_PROTOCOL, DIRECT_TIMEOUT_S)
        except UnavailableError as error:
            logger.debug("The connection with %s does not answer: %s", self._peer_id, error)
        return None

    async def _through_a_relay(self) -> Stream:
        problems = []
        for relay in self.relays:
            try:
                return await self._through(relay)
            except RelayFullError as error:
                if self._ways.told.due(relay):
                    logger.warning("Relay %s, on the way to %s: %s", relay, self._peer_id, error)
                problems.append(f"relay {relay}: {error}")
            except KilohiveError as error:  # a relay may answer with anything
                problems.append(f"relay {relay}: {error}")
        raise UnavailableError("; ".join(problems) or f"{self._peer_id} names no relay")

    async def _through(self, relay: str) -> Stream:
        stream = await self._ways.links.open(self._ways.offer_of(relay))
        try:
            request = pb.ConnectRequest(peer_id=self._peer_id, addresses=self._ways.links.own_addresses)
            await stream.send(pb.RelayRequest(connect=request))
            answer = granted(await stream.receive(pb.RelayResponse, LINK_TIMEOUT_S))
        except BaseException:  # cancelled, too: no stream stays
            stream.close()
            raise
        self._punch(list(answer.addresses))
        return stream

    def _punch(self, addresses: list[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._punching is None and now_s >= self._punch_after_s:
            self._punch_after_s = now_s + PUNCH_AGAIN_S
            self._punching = asyncio.create_task(self._straighten(addresses), name=f"punch to {self._peer_id}")
            self._punching.add_done_callback(self._punched)

    def _punched(self, _: asyncio.Task[None]) -> None:
        self._punching = None

    async def _straighten(self, addresses: list[str]) -> None:
        if await punch(self._streams, self._peer_id, addresses):
            logger.info("There is a direct connection with %s now, without its relay", self._peer_id)
            for relayed in list(self._relayed):
                relayed.end_when_quiet()


class _Relayed:
    """One connection through a relay."""

    def __init__(self, local: Stream, far: Stream) -> None:
        self._local, self._far = local, far
        self._moved_s = 0.0
        self._leaving = asyncio.Event()

    async def carry(self) -> None:
        await until_one_ends(splice(self._local, self._far, IDLE_S, self._moved), self._until_quiet())

    def end_when_quiet(self) -> None:
        """Nothing has moved for QUIET_S, or MOVE_WITHIN_S are over."""
        self._leaving.set()

    def _moved(self, _: int) -> None:
        self._moved_s = asyncio.get_running_loop().time()

    async def _until_quiet(self) -> None:
        await self._leaving.wait()
        loop = asyncio.get_running_loop()
        last_s = loop.time() + MOVE_WITHIN_S
        while (quiet_in_s := self._moved_s + QUIET_S - loop.time()) > 0 and loop.time() < last_s:  # noqa: ASYNC110 - bytes move too often for an event each
            await asyncio.sleep(quiet_in_s)


async def expose(streams: Streams, endpoint: str) -> None:
    """Let peers' tunnels end at this node's server, `endpoint` being its host:port. Raises UnavailableError."""
    host, _, port = endpoint.rpartition(":")

    async def arrived(stream: Stream) -> None:
        try:
            async with asyncio.timeout(LINK_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError as error:
            raise UnavailableError(f"this node's server does not answer: {error}") from None
        await splice(stream, Stream("this node", reader, writer), IDLE_S)

    await streams.serve(TUNNEL_PROTOCOL, arrived)
