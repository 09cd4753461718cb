"""Where a lighthouse listens, what it tells others about that, and whom it joins through."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from common.errors import ConfigError, IdentityError, UnavailableError
from dht.addresses import cannot_listen, is_own, listen_host, tcp_address
from protocol.addresses import split_flag
from protocol.identity import public_key_of
from protocol.swarm_file import last_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.lighthouse.config import LighthouseConfig

MAX_PORT = 65_535
BACKLOG = 128


async def listen(config: LighthouseConfig, initial_peers: Sequence[str]) -> trio.SocketListener:
    """Listen where a person said, at last time's port where they named none. Raises a KilohiveError."""
    if not 0 <= config.port <= MAX_PORT:
        raise ConfigError(f"--port: must be from 0 (any) to {MAX_PORT}, is {config.port}")
    host = await trio.to_thread.run_sync(listen_host, config.listen, initial_peers)
    _check_announced(host, config.announce)
    last = last_port(config.state / "swarm.toml") if config.port == 0 else 0
    try:
        return await _bind(host, config.port or last)
    except UnavailableError:
        if not last or not is_own(host):
            raise
        raise ConfigError(
            f"port {last} of {host}, where the nodes of this run look for this lighthouse, is in use: stop what uses "
            "it, or choose another port with --port and give the nodes the new address"
        ) from None


def announced(listener: trio.SocketListener, announce: str, peer_id: str) -> str:
    """The multiaddress that others are told."""
    host, port = listener.socket.getsockname()[:2]
    told_host, told_port = split_flag("--announce", announce) if announce else (host, port)
    return f"{tcp_address(told_host, told_port or port)}/p2p/{peer_id}"


def initial_members(initial_peers: Sequence[str]) -> dict[bytes, list[bytes]]:
    """Peers to join through and where each is; raises ConfigError for what is no address of a peer."""
    found: dict[bytes, list[bytes]] = {}
    for text in initial_peers:
        address, _, peer_id = text.rpartition("/p2p/")
        try:
            public_key_of(peer_id)
            where = Multiaddr(address).to_bytes()
        except (IdentityError, MultiaddrError, ValueError) as error:
            raise ConfigError(f"initial peer {text[:120]!r} is not a peer's multiaddress ({error})") from None
        found.setdefault(ID.from_string(peer_id).to_bytes(), []).append(where)
    return found


def _check_announced(host: str, announce: str) -> None:
    told = split_flag("--announce", announce)[0] if announce else ""
    for flag, text, is_told in (("--listen", host, not announce), ("--announce", told, True)):
        try:
            unspecified = bool(text) and ipaddress.ip_address(text).is_unspecified
        except ValueError:
            raise ConfigError(f"{flag}: must be an IP address such as 192.0.2.1, is {text[:80]!r}") from None
        if unspecified and is_told:
            raise ConfigError(f"{flag}: others cannot call {text}; name this machine's own address with --announce")


async def _bind(host: str, port: int) -> trio.SocketListener:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from None
    return trio.SocketListener(bound)
