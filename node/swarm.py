"""A node's way into a swarm: DHT, manifest, directory, dispatcher, built and stopped in order.

`Swarm` lives in an event loop. `SwarmClient` runs one in a thread for plain Python: a researcher's model, notebooks.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import uvloop

from dht.addresses import listen_host
from dht.directory import Directory
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from dht.reservations import RelayLinks, RelayOffer
from dht.tunnel import Tunnels
from node.dispatch.client import ExpertClient
from node.dispatch.dispatcher import DispatchConfig, Dispatcher
from node.moe import RemoteMoE
from node.security import Security
from protocol.admission import NOT_INVITED, Admission
from protocol.endpoints import announced_endpoint, announced_host
from protocol.errors import ConfigError, DrainingError, UnavailableError
from protocol.identity import Identity
from protocol.swarm_choice import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Self

    from node.config import SwarmConfig
    from node.security import Caller
    from protocol.manifest import Manifest

R = TypeVar("R")
STOP_TIMEOUT_S = 5.0


class Swarm:
    """Everything a node needs to find peers and, with `dispatch`, to call their experts."""

    def __init__(
        self, config: SwarmConfig, identity: Identity, make_client: Callable[[Caller], ExpertClient] = ExpertClient
    ) -> None:
        self._config, self.identity, self._make_client = config, identity, make_client
        self.security = Security(identity, config.insecure_local)
        self._stack = AsyncExitStack()
        self.announce = config.announce
        self.listen: str
        self.relay_links: RelayLinks
        self.admission: Admission
        self.initial_peers: tuple[str, ...]
        self.dht: DhtNode
        self.manifest: Manifest
        self.directory: Directory
        self.client: ExpertClient
        self.dispatcher: Dispatcher

    async def join(self) -> None:
        """Join the DHT, fetch and check the manifest, fill the directory; raises UnavailableError if nobody answers.

        Raises ConfigError for a closed run whose token the configuration does not have.
        """
        self.admission, initial_peers = resolve(self._config)
        run_id, self.initial_peers = self.admission.run_id, initial_peers
        self.listen = listen_host(self._config.listen, initial_peers)
        self.security.check_listen(self.listen)
        announced_endpoint(self.announce, f"{self.listen}:1")  # a mistake in it is told before anything is started
        # p2pd is spawned here, before this process's first gRPC call: gRPC does not survive a fork.
        self.dht = await DhtNode.start(
            DhtConfig(
                identity=self.identity,
                initial_peers=initial_peers,
                host=self.listen,
                port=self._config.dht_port,
                announce=announced_host(self._config.announce) if self._config.dht_port else "",
                admission=self.admission,
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

    def dispatch(self, config: DispatchConfig) -> Dispatcher:
        """Dispatcher over this swarm; closed with it."""
        self.client = self._make_client(self.security.caller())
        self._stack.push_async_callback(self.client.close)
        loop = asyncio.get_running_loop()
        self.dispatcher = Dispatcher(self.manifest, self.directory, self.client, config, loop)
        self._stack.callback(self.dispatcher.close)
        return self.dispatcher

    async def leave(self) -> None:
        """Stop everything that `join` and `dispatch` started, last first. Safe after a failed join."""
        await self._stack.aclose()


class SwarmClient:
    """A swarm for synchronous code: `with SwarmClient(config) as swarm: layer = swarm.moe_layer(0, generator)`.

    `make_client` makes what carries the calls: a test's may lose some.
    """

    def __init__(
        self,
        config: SwarmConfig,
        dispatch: DispatchConfig | None = None,
        identity: Identity | None = None,
        make_client: Callable[[Caller], ExpertClient] = ExpertClient,
    ) -> None:
        self._config, self._dispatch = config, dispatch or DispatchConfig()
        self._identity = identity or Identity.generate()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kilohive-swarm-client", daemon=True)
        self._swarm = Swarm(config, self._identity, make_client)

    @property
    def manifest(self) -> Manifest:
        """The run's manifest, checked."""
        return self._swarm.manifest

    @property
    def directory(self) -> Directory:
        """Live view of the swarm; reads are thread-safe."""
        return self._swarm.directory

    @property
    def dispatcher(self) -> Dispatcher:
        """Set `run_tokens` on it before each training step."""
        return self._swarm.dispatcher

    @property
    def client(self) -> ExpertClient:
        """Counts the bytes on the wire."""
        return self._swarm.client

    def moe_layer(self, layer: int, generator: torch.Generator | None = None) -> RemoteMoE:
        """MoE layer `layer` of the run as a torch module, with a gate of its own to train."""
        return RemoteMoE(self.dispatcher, layer, generator or torch.Generator().manual_seed(self.manifest.seed))

    def wait_for_all_blocks(self, timeout_s: float) -> None:
        """Return once every block has a live replica; raises UnavailableError naming how many have none."""
        self.call(wait_for_blocks(self.directory, timeout_s), timeout_s + 1)

    def call(self, coroutine: Coroutine[Any, Any, R], timeout_s: float) -> R:
        """Run on the client's event loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.call(self._open(), self._config.join_timeout_s + STOP_TIMEOUT_S)
        except BaseException:  # interrupted, too: `with` does not call __exit__ when __enter__ raises
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self.call(self._swarm.leave(), STOP_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)
            self._loop.close()

    async def _open(self) -> None:
        await self._swarm.join()
        self._swarm.dispatch(self._dispatch)


async def until_stopped(work: Coroutine[Any, Any, R], stop: asyncio.Event) -> R:
    """`work`'s result; DrainingError, with `work` cancelled, as soon as `stop` is set."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DrainingError("stopped before it was done")
        return working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def wait_for_blocks(directory: Directory, timeout_s: float) -> None:
    """Return once every block of the run has a live replica."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while lost := directory.snapshot().lost_blocks():
        left_s = deadline - loop.time()
        if left_s <= 0:
            names = ", ".join(map(str, lost[:5]))
            raise UnavailableError(f"{len(lost)} blocks have no live replica after {timeout_s:.0f} s: {names} ...")
        await directory.wait_for_change(min(left_s, 1.0))
