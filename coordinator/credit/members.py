"""Who is in a run, as signed records say it: they alone earn, and a trainer no more than it says that it trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dht.record_cache import RecordCache
from protocol.announcements import PeerRecord
from protocol.endpoints import Address
from protocol.records import peers_key

if TYPE_CHECKING:
    from dht.record_store import RecordStore
    from protocol.admission import Admission

EARNING_ROLES = frozenset({"host", "trainer"})


class RunMember(NamedTuple):
    """A host or trainer that is live; `own_tokens` are those that it says it has trained on."""

    address: Address
    role: str
    own_tokens: int


class RunMembers:
    """Looks the peers of one run up. Belongs to the event loop."""

    def __init__(self, dht: RecordStore, admission: Admission) -> None:
        self._dht, self._key, self._cache = dht, peers_key(admission.run_id), RecordCache(admission)

    async def look(self) -> tuple[RunMember, ...]:
        """Hosts and trainers that are live now, ordered by peer id. Raises UnavailableError."""
        self._cache.take(await self._dht.get_many([self._key]), self._dht.now_s())
        return tuple(
            RunMember(Address(peer_id, said.endpoint), said.role, said.own_tokens)
            for peer_id, said in self._live()
            if said.role in EARNING_ROLES
        )

    def relay_addresses(self) -> dict[str, str]:
        """Return where relays are dialled, by peer id, as they were at the last look."""
        return {peer_id: said.relay for peer_id, said in self._live() if said.relay}

    def _live(self) -> list[tuple[str, PeerRecord]]:
        found = self._cache.live(self._dht.now_s())
        peers = {record.owner: said for record, said in found if isinstance(said, PeerRecord)}
        return sorted(peers.items(), key=lambda item: item[0])
