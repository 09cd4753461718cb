"""A node's way into a swarm: DHT, manifest, directory, tunnels, built and stopped in order. In an event loop."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from common.clock import SteadyClock
from common.errors import ConfigError
from common.text import host_port
from dht.address_watch import AddressWatch
from dht.addresses import listen_host
from dht.directory import Directory
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from dht.peer_memory import PEERS_FILE
from dht.relay.reservations import RelayLinks, RelayOffer
from dht.relay.tunnel import Tunnels
from dht.swarm_config import resolve
from node.membership.config import ReachConfig
from protocol.admission import NOT_INVITED, Admission
from protocol.endpoints import announced_endpoint, announced_host
from protocol.security import Security

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from node.membership.config import SwarmConfig
    from protocol.identity import Identity
    from protocol.manifest import Manifest

STOP_TIMEOUT_S = 5.0


class Swarm:
    """Everything a node needs to find its peers, and what it proves itself to them with.

    Without `reach` it finds by itself how it can be reached, as suits who only calls others. In `folder` it remembers
    its peers for the next time.
    """

    def __init__(
        self, config: SwarmConfig, identity: Identity, reach: ReachConfig | None = None, folder: Path | None = None
    ) -> None:
        self._folder = folder
        self._config, self._reach, self.identity = config, reach or ReachConfig(), identity
        self._clock = SteadyClock()
        self.security = Security(identity, config.insecure_local, clock=self._clock)
        self._stack = AsyncExitStack()
        self.announce = self._reach.announce
        self.listen: str
        self.relay_links: RelayLinks
        self.admission: Admission
        self.initial_peers: tuple[str, ...]
        self.dht: DhtNode
        self.manifest: Manifest
        self.directory: Directory

    async def join(self) -> None:
        """Join the DHT, fetch and check the manifest, fill the directory; raises UnavailableError if nobody answers.

        Raises ConfigError for a closed run whose token the configuration does not have.
        """
        self.admission, initial_peers = resolve(self._config)
        run_id, self.initial_peers = self.admission.run_id, initial_peers
        self.listen = await asyncio.to_thread(listen_host, self._reach.listen, initial_peers)
        self.security.check_listen(self.listen)
        announced_endpoint(
            self.announce, host_port(self.listen, 1)
        )  # a mistake in it is told before anything is started
        self.dht = await DhtNode.start(
            DhtConfig(
                identity=self.identity,
                initial_peers=initial_peers,
                host=self.listen,
                port=self._reach.dht_port,
                announce=announced_host(self._reach.announce) if self._reach.dht_port else "",
                clock=self._clock,
                admission=self.admission,
                peers_file=self._folder / PEERS_FILE if self._folder is not None else None,
            )
        )
        self._stack.push_async_callback(self.dht.stop)
        self.manifest = await fetch_manifest(self.dht, run_id, self._config.join_timeout_s)
        self.dht.serve_only(self.manifest)
        self.directory = Directory(self.dht, run_id, self.manifest.model)
        await self.directory.start()
        self._stack.push_async_callback(self.directory.stop)
        if self.directory.asks_for_tickets and not self.admission.closed:
            raise ConfigError(NOT_INVITED)
        self.relay_links = RelayLinks(self.dht.streams, self.dht.udp_address)
        tunnels = Tunnels(self.dht.streams, self.relay_links, self._relay_offer)
        self._stack.push_async_callback(tunnels.close)
        self.security = replace(self.security, tunnels=tunnels, admission=self.admission)

    def address_watch(self) -> AddressWatch:
        """Return what notices that this node cannot go on at its address."""
        return AddressWatch(self._reach.listen, self.listen, self.initial_peers)

    def relay_offers(self) -> list[RelayOffer]:
        """Peers that carry calls to those whom nobody can dial."""
        own_id = self.identity.peer_id
        return [
            RelayOffer(peer.peer_id, peer.relay)
            for peer in self.directory.peers()
            if peer.relay and peer.peer_id != own_id
        ]

    def _relay_offer(self, peer_id: str) -> RelayOffer:
        """A relay's, without an address if it is not known as one."""
        return next((o for o in self.relay_offers() if o.peer_id == peer_id), RelayOffer(peer_id, ""))

    def on_leave(self, close: Callable[[], object]) -> None:
        """Call `close`, and await what it returns if that can be awaited, when the swarm is left, before all else."""

        async def closing() -> None:
            result = close()
            if inspect.isawaitable(result):
                await result

        self._stack.push_async_callback(closing)

    async def leave(self) -> None:
        """Stop everything that `join` started, last first. Safe after a failed join."""
        await self._stack.aclose()
