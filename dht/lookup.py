"""One lookup of many keys: whoever is asked for one is asked for all at once, and what all of them know is merged.

hivemind's own lookup asks for the square root of the keys in a call, which is many calls for a run of many blocks, and
its calls cost more than what is in them.
"""
# ruff: noqa: SLF001 - the one call of hivemind's node that remembers who does not answer is private

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.traverse import traverse_dht

from dht.packing import unwrap

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hivemind.dht.node import DHTNode
    from hivemind.p2p import PeerID

MAX_KEYS_PER_CALL = 64
"""An answer brings all records of each."""


class Lookup:
    """Searches until `n_asked` peers nearest to each key have answered or failed; to be run once, and never cancelled.

    `found` has records by key and sub-key, at any moment of those keys whose search has ended.
    """

    def __init__(self, node: DHTNode, keys: Sequence[str], n_asked: int) -> None:
        self.found: dict[str, dict[str, bytes]] = {}
        self._node, self._n_asked = node, n_asked
        self._keys = {DHTID.generate(source=key): key for key in keys}
        self._records = {key_id: DictionaryDHTValue() for key_id in self._keys}
        self._peers: dict[DHTID, PeerID] = {}

    async def run(self) -> None:
        """Raises whatever hivemind does."""
        protocol, me = self._node.protocol, self._node.node_id
        for key_id in self._keys:
            self._merge(key_id, protocol.storage.get(key_id))
            near = protocol.routing_table.get_nearest_neighbors(key_id, protocol.bucket_size, exclude=me)
            self._peers.update(near)
        await traverse_dht(
            queries=list(self._keys),
            initial_nodes=list(self._peers),
            beam_size=self._n_asked,
            num_workers=self._node.num_workers,
            queries_per_call=MAX_KEYS_PER_CALL,
            get_neighbors=self._ask,
            visited_nodes={key_id: {me} for key_id in self._keys},
            found_callback=self._end,
            await_all_tasks=False,
        )
        for key_id in self._keys:
            await self._end(key_id)

    async def _ask(self, place: DHTID, key_ids: Collection[DHTID]) -> dict[DHTID, tuple[tuple[DHTID, ...], bool]]:
        answer = await self._node._call_find_with_blacklist(self._peers[place], list(key_ids)) or {}
        for key_id, (value, neighbors) in answer.items():
            self._merge(key_id, value)
            self._peers.update(neighbors)
        return {key_id: (tuple(answer[key_id][1]) if key_id in answer else (), False) for key_id in key_ids}

    def _merge(self, key_id: DHTID, found: Any) -> None:  # noqa: ANN401 - hivemind's values have no types
        if found is not None and isinstance(found.value, DictionaryDHTValue):
            for owner, (value, expiration_s) in found.value.items():
                self._records[key_id].store(owner, value, expiration_s)

    async def _end(self, key_id: DHTID, *_: object) -> None:
        self.found[self._keys[key_id]] = {owner: unwrap(item.value) for owner, item in self._records[key_id].items()}
