"""Where others call this node: at its own port or, if nobody can, through relays. It asks, acts on it, and tells."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from common.errors import UnavailableError
from common.tasks import repeat
from dht.addresses import looked_up
from dht.relay.quotas import RelayLimits
from dht.relay.relay import Relay
from dht.relay.reservations import Reservations
from dht.relay.tunnel import expose
from node.membership.events import RelaysEvent
from node.membership.reachability import ReachabilityWatch
from protocol.endpoints import announced_endpoint, relayed_endpoint

if TYPE_CHECKING:
    from common.events import EventLog
    from dht.announcer import Announcer
    from dht.relay.quotas import RelaySettings
    from node.membership.swarm import Swarm
    from protocol.announcements import Reachability

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 600.0
LOOKUP_TIMEOUT_S = 5.0
LOOK_SOON_S = 15.0
"""The pause after a check that found nobody to ask, or nobody who could call."""


class NodeEndpoint:
    """One node's place for others, from `settle` on. Belongs to the event loop.

    With settings of a relay, and at least one circuit, it is one for others too, as long as others can dial it.
    """

    def __init__(self, swarm: Swarm, events: EventLog, relay: RelaySettings | None = None) -> None:
        self._relay = Relay(swarm.dht.streams, RelayLimits.of(relay)) if relay and relay.relay_circuits else None
        self._swarm, self._events = swarm, events
        peer_id = swarm.identity.peer_id
        self._watch = ReachabilityWatch(swarm.security.caller(), swarm.directory.peers, peer_id, events)
        self._reservations = Reservations(
            swarm.dht.streams, swarm.relay_links, swarm.relay_offers, self._relays_changed, peer_id
        )
        self._own = ""
        self._changed = asyncio.Event()

    @property
    def endpoint(self) -> str:
        """What this node announces: host:port or, if that cannot be called, its relays."""
        return relayed_endpoint(self._reservations.held) if self._reservations.wanted else self._own

    @property
    def state(self) -> Reachability:
        """What it announces of that."""
        through_relays = self._reservations.wanted and self._reservations.held
        return "relayed" if through_relays else self._watch.state

    @property
    def relay_offer(self) -> str:
        """Where this node is dialled as a relay, if it is one: only who can be dialled can."""
        return self._swarm.dht.relay_address if self._relay and self._watch.state == "reached" else ""

    async def settle(self, endpoint: str) -> None:
        """Find out whether `endpoint`, host:port of this node's server, can be called, and find relays if not."""
        self._own = announced_endpoint(self._swarm.announce, endpoint)
        await expose(self._swarm.dht.streams, endpoint)
        if self._relay is not None:
            await self._relay.start()
        await self._look()
        if self._reservations.wanted:
            await self._reservations.reserve()

    async def watch(self, announcer: Announcer) -> None:
        """Look again and again, keep relays while they are needed, announce every change, until cancelled.

        After a restart of p2pd the relays are asked again and everything is announced at once.
        """
        self._swarm.dht.on_restart(self._reservations.start_over)
        self._swarm.dht.on_restart(announcer.announce_soon)
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat(self._look, self._pause_s), name="reachability")
            group.create_task(self._reservations.keep(), name="relays")
            group.create_task(self._announce_changes(announcer), name="endpoint")

    async def close(self) -> None:
        """Leave the relays; safe to call twice."""
        await self._reservations.close()

    def _pause_s(self) -> float:
        return LOOK_AGAIN_S if self._watch.state == "reached" else LOOK_SOON_S

    async def _look(self) -> None:
        found = await asyncio.gather(*(_addresses(peer.split("/")[2]) for peer in self._swarm.initial_peers))
        others = [address for addresses in found for address in addresses]
        hosts = await self._own_addresses()
        if not self._watch.look_at_itself(self._own, others, hosts):
            await self._watch.look(self._own, hosts)
        self._reservations.wanted = self._watch.state == "not reached"

    async def _own_addresses(self) -> tuple[str, ...]:
        """Addresses of the name that is announced; a machine's own name may lead to loopback on the machine itself."""
        host = self._own.rpartition(":")[0]
        found = await _addresses(host)
        return () if found == (host.strip("[]"),) else (*found, self._swarm.listen)

    def _relays_changed(self) -> None:
        relays = self._reservations.held
        self._events.emit(RelaysEvent(relays=tuple(relays)))
        if relays:
            names = " and ".join(relays)
            logger.info("Others reach this node through %s: calls take a detour until both sides meet directly", names)
        elif self._reservations.wanted:
            logger.warning("This node has no relay any more; looking for another")
        self._changed.set()

    async def _announce_changes(self, announcer: Announcer) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(UnavailableError):  # the next announcement says it too
                await announcer.announce_now()


async def _addresses(host: str) -> tuple[str, ...]:
    """Return the addresses of a name, or the name itself if nobody knows it in time."""
    try:
        async with asyncio.timeout(LOOKUP_TIMEOUT_S):
            return await asyncio.to_thread(looked_up, host) or (host,)
    except TimeoutError:
        return (host,)
