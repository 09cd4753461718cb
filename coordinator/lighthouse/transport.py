"""libp2p for the lighthouse: encrypted connections in and out, bounded, and a stream for each call.

What py-libp2p 0.8.1 leaves open is closed here. Its default host accepts plaintext. Its listener counts connections up
and never down. An error in the handler of one stream, such as a protocol's name that is not UTF-8, ends the process.
A peer that ignores flow control fills the memory. See ADR 17.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.security.tls.transport import TLSTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from common.errors import UnavailableError
from coordinator.lighthouse.connection_limits import (
    MAX_CONNECTIONS_PER_ADDRESS,
    MAX_STREAMS,
    MAX_STREAMS_PER_PEER,
    MAX_UNREAD_BYTES,
    ConnectionLimit,
)
from coordinator.lighthouse.streams import TrioStream, one_error
from protocol.identity import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from protocol.identity import Identity

logger = logging.getLogger(__name__)

MAX_CONNECTIONS_PER_PEER = 4
HANDSHAKE_TIMEOUT_S = 10.0
DIAL_TIMEOUT_S = 5.0
VANISHED_TIMEOUT_MS = 60_000
"""A machine that lost its power says no goodbye, and Yamux does not end a connection whose pings have no answer."""

MAX_ADDRESSES = 8
"""The most addresses of one peer to remember or to pass on."""


class TrioTransport:
    """Connections of one identity. Made by `open_transport`, which also ends it."""

    def __init__(self, identity: Identity, addresses: Sequence[str], max_connections: int) -> None:
        self.me = ID.from_string(identity.peer_id).to_bytes()
        self.addresses = [Multiaddr(address) for address in addresses]
        self._host = _host(identity, self.addresses, max_connections)
        self._swarm = self._host.get_network()
        self._swarm.set_stream_handler(self._take_stream)
        self._connecting = ConnectionLimit(max_connections, MAX_CONNECTIONS_PER_ADDRESS)
        self._streams = ConnectionLimit(MAX_STREAMS, MAX_STREAMS_PER_PEER)

    @property
    def connected(self) -> list[bytes]:
        """Peers with a connection."""
        return [peer.to_bytes() for peer in self._host.get_connected_peers()]

    @property
    def refused(self) -> int:
        """Connections and streams over their limits, since the start."""
        return self._connecting.refused + self._streams.refused

    def handle(self, protocol: str, handler: Callable[[TrioStream], Awaitable[None]]) -> None:
        """Let peers open streams for a protocol; the stream is closed when `handler` returns, cut off if it raises."""

        async def wrapped(stream: Any) -> None:  # noqa: ANN401 - see streams.py
            own = TrioStream(stream)
            try:
                await handler(own)
            except UnavailableError as error:
                logger.debug("%s: %s", protocol, error)
                await own.reset()
            else:
                await own.close()

        self._host.set_stream_handler(protocol, wrapped)

    def addresses_of(self, peer: bytes) -> list[bytes]:
        """Where a peer says that it is, as bytes of multiaddresses."""
        with_peer = self._host.get_peerstore()
        try:
            return [address.to_bytes() for address in with_peer.addrs(ID(peer))[:MAX_ADDRESSES]]
        except LookupError:
            return []

    async def open_stream(self, peer: bytes, protocol: str) -> TrioStream:
        """A stream to a peer that is connected or whose address is known. The caller bounds the time."""
        with one_error(protocol):
            return TrioStream(await self._host.new_stream(ID(peer), [protocol]))

    async def dial(self, peer: bytes, addresses: Sequence[bytes]) -> None:
        """Connect to a peer at one of its addresses; raises UnavailableError."""
        try:
            found = [Multiaddr(address) for address in addresses[:MAX_ADDRESSES]]
        except (MultiaddrError, ValueError) as error:
            raise UnavailableError(f"libp2p: dial: {error}") from None
        self._swarm.unblock_peer(ID(peer))  # libp2p would not try again for a minute
        with one_error("dial"), trio.move_on_after(DIAL_TIMEOUT_S) as limit:
            await self._host.connect(PeerInfo(ID(peer), found))
        if limit.cancelled_caught:
            raise UnavailableError(f"libp2p: dial: no answer in {DIAL_TIMEOUT_S:g} s")

    async def _take_stream(self, stream: Any) -> None:  # noqa: ANN401 - see streams.py
        peer = stream.muxed_conn.peer_id.to_bytes()
        with self._streams.place(peer) as free:
            if not free:
                await TrioStream(stream).reset()
                return
            try:
                await self._host._swarm_stream_handler(stream)  # noqa: SLF001 - what it sets as handler itself
            except Exception:  # a task's boundary: an error in one stream would end every other
                logger.debug("a stream of %s failed", stream.muxed_conn.peer_id, exc_info=True)
                await TrioStream(stream).reset()

    async def take_connection(self, tcp: trio.SocketStream) -> None:
        """A connection from outside, until it ends."""
        try:
            where = tcp.socket.getpeername()[0]
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_TIMEOUT_MS)
        except OSError:  # it has left already
            where = ""
        with self._connecting.place(where) as free:
            try:
                if free:
                    await self._serve_connection(RawConnection(TrioTCPStream(tcp), initiator=False))
            except Exception:  # a task's boundary: nobody's handshake may end the process
                logger.debug("a connection from %s failed", where, exc_info=True)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(tcp)

    async def _serve_connection(self, raw: RawConnection) -> None:
        muxed = await self._swarm.upgrade_inbound_raw_conn(raw, self.addresses[0])
        await muxed.event_closed.wait()

    @asynccontextmanager
    async def running(self, listeners: Sequence[trio.SocketListener]) -> AsyncIterator[None]:
        """Take connections while the context lasts; at its end they are cut off."""
        async with trio.open_nursery() as nursery, background_trio_service(self._swarm):
            nursery.start_soon(trio.serve_listeners, self.take_connection, list(listeners))
            nursery.start_soon(self._host.get_peerstore().start_cleanup_task, 60)
            try:
                yield
            finally:
                # libp2p would close connection after connection, a fifth of a second each.
                nursery.cancel_scope.cancel()


class _BoundedYamux(Yamux):  # type: ignore[misc]  # libp2p is not on every machine that checks types
    """Yamux that does not only count what a peer sends beyond its window."""

    async def _read_data_body(self, length: int) -> bytes:
        if length + sum(map(len, self.stream_buffers.values())) > MAX_UNREAD_BYTES:
            raise trio.TooSlowError  # the error upon which it ends the connection
        body: bytes = await super()._read_data_body(length)
        return body


class _Muxers(MuxerMultistream):  # type: ignore[misc]  # see above
    async def new_conn(self, conn: Any, peer_id: Any) -> Any:  # noqa: ANN401 - see streams.py
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = _BoundedYamux(conn, peer_id, is_initiator=conn.is_initiator)
        return self._annotate_connection(muxed, conn, protocol)


def _host(identity: Identity, addresses: Sequence[Multiaddr], max_connections: int) -> Any:  # noqa: ANN401 - see above
    pair = _key_pair(identity)
    muxers = {YAMUX: _BoundedYamux}
    host = new_host(
        key_pair=pair,
        # Without `sec_opt` it would accept connections that are not encrypted.
        sec_opt={NOISE: NoiseTransport(pair, noise_privkey=new_noise_key().private_key), TLS: TLSTransport(pair)},
        muxer_opt=muxers,
        announce_addrs=list(addresses),
        connection_config=_connection_config(max_connections),
        disable_identify_address_discovery=True,
    )
    swarm = host.get_network()
    swarm.set_resource_manager(None)  # bounds.py counts instead: libp2p's makes everybody wait for whoever is greedy
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.upgrader.muxer_multistream = _Muxers(muxers)
    return host


def _connection_config(max_connections: int) -> ConnectionConfig:
    """Nobody is dialled whom we did not ask for, and nobody is sent away for being idle."""
    return ConnectionConfig(
        max_connections=max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=max_connections,
        max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
        dial_timeout=DIAL_TIMEOUT_S,
        inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
        outbound_upgrade_timeout=DIAL_TIMEOUT_S,
    )


def _key_pair(identity: Identity) -> KeyPair:
    private = Ed25519PrivateKey.from_bytes(identity.private_key_protobuf[-2 * KEY_BYTES : -KEY_BYTES])
    return KeyPair(private, private.get_public_key())


def quiet_libp2p() -> None:
    """Drop its chatter; LIBP2P_LOGLEVEL=DEBUG brings it back."""
    for name in ("libp2p", "multiaddr"):
        logging.getLogger(name).setLevel(os.environ.get("LIBP2P_LOGLEVEL", "CRITICAL"))
