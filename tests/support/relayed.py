"""Nodes that do not see each other, for tests of relays: what is hidden echoes, and callers reach it by tunnels."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from dht.relay.reservations import RelayLinks, RelayOffer, Reservations
from dht.relay.tunnel import Tunnels, expose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dht.node import DhtNode
    from dht.streams import Streams

WAIT_S = 10.0


class Apart:
    """Streams that see no connection with one peer, as if both were behind NATs."""

    def __init__(self, streams: Streams, hidden: str) -> None:
        self._streams, self.hidden = streams, hidden
        self.open, self.dial, self.hang_up, self.serve = streams.open, streams.dial, streams.hang_up, streams.serve

    async def seen_at(self, peer_id: str, timeout_s: float) -> tuple[str, ...]:
        return () if peer_id == self.hidden else await self._streams.seen_at(peer_id, timeout_s)


def reservations_of(hidden: DhtNode, *offers: RelayOffer) -> Reservations:
    """At relays that it knows."""
    streams = hidden.streams
    return Reservations(streams, RelayLinks(streams), lambda: offers, lambda: None, hidden.peer_id)


def tunnels_apart(caller: DhtNode, hidden: str, *offers: RelayOffer) -> Tunnels:
    """A caller's, who knows of these relays where they are, if that is needed, and has no connection with `hidden`."""
    apart, known = Apart(caller.streams, hidden), {offer.peer_id: offer for offer in offers}
    return Tunnels(apart, RelayLinks(apart), lambda peer_id: known.get(peer_id, RelayOffer(peer_id, "")))  # type: ignore[arg-type]  # stands for Streams


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the other side ends, or the connection is cut."""
    try:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
    finally:
        writer.close()


@asynccontextmanager
async def echo_server(node: DhtNode) -> AsyncIterator[None]:
    """What the node's tunnel leads to."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    await expose(node.streams, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield
    finally:
        server.close()


async def connect(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To host:port."""
    host, _, port = endpoint.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def says(endpoint: str, words: bytes) -> bytes:
    """What is echoed there."""
    reader, writer = await connect(endpoint)
    try:
        writer.write(words)
        async with asyncio.timeout(WAIT_S):
            return await reader.readexactly(len(words))
    finally:
        writer.close()
