"""A full member of hivemind's DHT: is asked, asks, keeps records for others, and finds those that it has lost."""

from __future__ import annotations

import heapq
import logging
from typing import TYPE_CHECKING

import trio

from common.errors import InvalidInputError, UnavailableError
from coordinator.lighthouse.answers import MAX_KEYS_PER_SEARCH, Answers, distance
from coordinator.lighthouse.hivemind_pb2 import (
    FindRequest,
    FindResponse,
    NodeInfo,
    PingRequest,
    PingResponse,
    StoreRequest,
    StoreResponse,
)
from coordinator.lighthouse.repeating import repeat
from coordinator.lighthouse.search import KeySearch
from coordinator.lighthouse.table import RoutingTable
from dht.packing import place_of_key, place_of_peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from coordinator.lighthouse.kademlia import Kademlia
    from coordinator.lighthouse.rpc import DhtCalls
    from coordinator.lighthouse.store import StoredRecords
    from coordinator.lighthouse.transport import TrioTransport
    from dht.packing import Record

logger = logging.getLogger(__name__)

REFRESH_S = 10.0
QUIET_S = 20.0
"""A member that has said nothing for this long is asked whether it is there."""

MAX_PINGS = 16
"""The most pings in one refresh."""

MAX_CALLBACKS = 64
"""The most peers at a time that are called back because they asked for it."""

MAX_CALLS_AT_ONCE = 8
N_STORED_AT = 5
"""Members that keep a record of this node's, as many as nodes have keep theirs."""

SEARCH_TIMEOUT_S = 5.0
"""How long to search for the peers that are to keep a record; then those that have answered must do."""


class Member:
    """One node of the DHT; `initial` are peers to join through, with their addresses; `clock` gives seconds."""

    def __init__(
        self,
        transport: TrioTransport,
        calls: DhtCalls,
        kademlia: Kademlia,
        store: StoredRecords,
        initial: Mapping[bytes, Sequence[bytes]],
        clock: Callable[[], float],
    ) -> None:
        self._transport, self._calls, self._kademlia, self._store = transport, calls, kademlia, store
        self._initial, self._clock = initial, clock
        self._me = NodeInfo(node_id=place_of_peer(transport.me))
        self._answers = Answers(transport.me, store)
        self._callbacks = trio.CapacityLimiter(MAX_CALLBACKS)
        self.table = RoutingTable(transport.me)
        calls.serve("rpc_ping", PingRequest, self._ping)
        calls.serve("rpc_store", StoreRequest, self._take)
        calls.serve("rpc_find", FindRequest, self._find)

    async def run(self) -> None:
        """Stay in touch with the others, forever."""
        await repeat(self.refresh, REFRESH_S)

    async def refresh(self) -> None:
        """Meet initial peers that are not known, ask the quiet ones, look for neighbors, forget what has expired."""
        self._store.expire()
        lost = [peer for peer in self._initial if peer not in self.table and peer != self._transport.me]
        quiet = self.table.quiet_since(self._clock() - QUIET_S)
        async with trio.open_nursery() as nursery:
            for peer in (lost + quiet)[:MAX_PINGS]:
                nursery.start_soon(self._greet, peer)
        search = KeySearch({place_of_peer(self._transport.me): ""}, self.table, self._transport.me)
        await self._run(search)
        new = [peer for peer in search.peers if peer not in self.table]
        async with trio.open_nursery() as nursery:
            for peer in new[:MAX_PINGS]:
                nursery.start_soon(self._greet, peer)

    async def look_up(self, keys: Iterable[str], take: Callable[[str, dict[str, bytes]], None]) -> None:
        """Ask those nearest to each key; `take` gets what each of them, and this node, has: unchecked, by owner."""
        places = {place_of_key(key): key for key in keys}
        search = KeySearch(places, self.table, self._transport.me, take)
        batch = list(places)
        for start in range(0, len(batch), MAX_KEYS_PER_SEARCH):
            own = batch[start : start + MAX_KEYS_PER_SEARCH]
            search.answered(self._transport.me, own, self._answers.find(FindRequest(keys=own), ()))
        await self._run(search)

    async def nearest_to(self, key: str) -> list[bytes]:
        """Members that are to keep a record under a key, but for this one."""
        place = place_of_key(key)
        search = KeySearch({place: key}, self.table, self._transport.me)
        with trio.move_on_after(SEARCH_TIMEOUT_S):
            await self._run(search)
        return heapq.nsmallest(N_STORED_AT, search.answered_by, key=lambda peer: distance(place, place_of_peer(peer)))

    async def store(self, record: Record, members: Iterable[bytes]) -> None:
        """Keep a record of this node's here and at other members; who does not answer has others beside it."""
        request = StoreRequest(
            keys=[record.key],
            subkeys=[record.subkey],
            values=[record.value],
            expiration_time=[record.expiration_time],
            in_cache=[False],
            peer=self._me,
        )
        self._answers.store(request)
        async with trio.open_nursery() as nursery:
            for peer in members:
                nursery.start_soon(self._store_at, peer, request)

    async def _store_at(self, peer: bytes, request: StoreRequest) -> None:
        try:
            await self._connect(peer)
            await self._calls.call(peer, "rpc_store", request, StoreResponse)
        except (UnavailableError, InvalidInputError) as error:
            logger.debug("a member did not take this lighthouse's record: %s", error)
            self.table.silent(peer)

    async def _run(self, search: KeySearch) -> None:
        limit = trio.CapacityLimiter(MAX_CALLS_AT_ONCE)
        while calls := search.next_calls():
            async with trio.open_nursery() as nursery:
                for peer, places in calls.items():
                    nursery.start_soon(self._search_at, search, peer, places, limit)

    async def _search_at(
        self, search: KeySearch, peer: bytes, places: list[bytes], limit: trio.CapacityLimiter
    ) -> None:
        async with limit:
            try:
                await self._connect(peer)
                request = FindRequest(keys=places, peer=self._me)
                response = await self._calls.call(peer, "rpc_find", request, FindResponse)
            except (UnavailableError, InvalidInputError) as error:
                logger.debug("a search was not answered: %s", error)
                self.table.silent(peer)
                search.failed(peer)
                return
        if response.peer.node_id == place_of_peer(peer):
            self.table.heard_from(peer, self._clock())
        search.answered(peer, places, response)

    async def _greet(self, peer: bytes) -> None:
        """Ask a peer whether it is a member, and have it check that it can call us."""
        if await self._is_member(peer, validate=peer not in self.table):
            self.table.heard_from(peer, self._clock())
        else:
            self.table.silent(peer)

    async def _is_member(self, peer: bytes, *, validate: bool) -> bool:
        try:
            await self._connect(peer)
            request = PingRequest(peer=self._me, validate=validate)
            response = await self._calls.call(peer, "rpc_ping", request, PingResponse)
        except (UnavailableError, InvalidInputError) as error:
            logger.debug("no answer to a ping: %s", error)
            return False
        return response.peer.node_id == place_of_peer(peer)

    async def _connect(self, peer: bytes) -> None:
        if peer in self._transport.connected:
            return
        addresses = self._initial.get(peer) or await self._kademlia.addresses_of(peer)
        await self._transport.dial(peer, addresses)

    async def _ping(self, request: PingRequest, peer: bytes) -> PingResponse:
        """Whether who asks to be checked can be called is found out by calling."""
        claims = request.peer.node_id == place_of_peer(peer)
        available = False
        if request.validate and claims:
            async with self._callbacks:
                available = await self._is_member(peer, validate=False)
        if available or (claims and not request.validate):
            self.table.heard_from(peer, self._clock())
        return PingResponse(peer=self._me, dht_time=self._clock(), available=available)

    async def _take(self, request: StoreRequest, peer: bytes) -> StoreResponse:
        self._note(request.peer, peer)
        return self._answers.store(request)

    async def _find(self, request: FindRequest, peer: bytes) -> FindResponse:
        self._note(request.peer, peer)
        return self._answers.find(request, list(self.table))

    def _note(self, claimed: NodeInfo, peer: bytes) -> None:
        """Who is not a member, or claims a place that is not its own, is answered all the same."""
        if claimed.node_id == place_of_peer(peer):
            self.table.heard_from(peer, self._clock())
