"""A collection with what it needs: members of a run, channels to them, the ledger. Built and closed in one place."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.credit.collector import Collector
from coordinator.credit.ledger import Ledger
from coordinator.credit.members import RunMembers
from dht.relay.reservations import RelayLinks, RelayOffer
from dht.relay.tunnel import Tunnels
from protocol.channels import Channels
from protocol.security import Security

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coordinator.credit.collector import Collected
    from dht.node import DhtNode
    from protocol.admission import Admission
    from protocol.identity import Identity


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What collects one run's receipts into a folder, and may be asked again and again."""

    members: RunMembers
    collector: Collector
    ledger: Ledger

    async def look(self) -> None:
        """Note who is in the run now, and what trainers announce. Raises UnavailableError, StorageError."""
        await asyncio.to_thread(self.ledger.see, await self.members.look())

    async def collect(self) -> Collected:
        """Ask everybody who is in the run now. Raises UnavailableError, StorageError."""
        return await self.collector.collect(await self.members.look())


@asynccontextmanager
async def open_collection(
    folder: Path, dht: DhtNode, identity: Identity, admission: Admission
) -> AsyncIterator[Collection]:
    """A collection over a DHT that this node has joined; it signs its calls with `identity`.

    Raises StorageError, ConfigError if the folder holds another run's.
    """
    members, ledger = RunMembers(dht, admission), Ledger(folder, admission.run_id)

    def relay(peer_id: str) -> RelayOffer:
        return RelayOffer(peer_id, members.relay_addresses().get(peer_id, ""))

    tunnels = Tunnels(dht.streams, RelayLinks(dht.streams, dht.udp_address), relay)
    channels = Channels(Security(identity, tunnels=tunnels, admission=admission, clock=dht.now_s).caller())
    try:
        await asyncio.to_thread(ledger.open)
        collector = Collector(admission.run_id, ledger, channels, dht.now_s)
        yield Collection(members=members, collector=collector, ledger=ledger)
    finally:
        await channels.close()
        await tunnels.close()
        await asyncio.to_thread(ledger.close)
