"""What a lighthouse answers to a peer that stores or searches. No sockets: who called is the transport's to prove."""

from __future__ import annotations

import heapq
from functools import partial
from typing import TYPE_CHECKING

from common.errors import InvalidInputError, LimitExceededError, RecordError
from coordinator.lighthouse.hivemind_pb2 import (
    FOUND_DICTIONARY,
    FindRequest,
    FindResponse,
    FindResult,
    NodeInfo,
    StoreRequest,
    StoreResponse,
)
from dht.packing import (
    DICTIONARY_TAG,
    MAX_KEYS_PER_REQUEST,
    Record,
    pack_dictionary,
    place_of_peer,
    unpack_dictionary,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from coordinator.lighthouse.store import StoredRecords

MAX_KEYS_PER_SEARCH = 256
"""An answer has records and neighbors for each; a lookup of Kilohive's asks for 64 at once."""

MAX_VALUE_BYTES = 3 << 20
"""The most bytes of records in one answer, below a frame's limit; keys beyond it are answered as not found."""

N_NEIGHBORS = 20


class Answers:
    """Answers as the node whose peer id is `me`, from a store that it may change."""

    def __init__(self, me: bytes, store: StoredRecords) -> None:
        self._info = NodeInfo(node_id=place_of_peer(me))
        self._store = store

    def store(self, request: StoreRequest) -> StoreResponse:
        """Keep what can be kept; raises InvalidInputError or LimitExceededError for a request that makes no sense."""
        _check_keys(len(request.keys), MAX_KEYS_PER_REQUEST)
        columns = (request.keys, request.subkeys, request.values, request.expiration_time)
        if len({len(column) for column in columns}) != 1:
            raise InvalidInputError("keys", "are not as many as sub-keys, values and expirations")
        return StoreResponse(store_ok=[self._take(Record(*row)) for row in zip(*columns, strict=True)], peer=self._info)

    def find(self, request: FindRequest, peers: Collection[bytes]) -> FindResponse:
        """Records under each key, and those of `peers` that are nearest to it; raises LimitExceededError."""
        _check_keys(len(request.keys), MAX_KEYS_PER_SEARCH)
        places = {place: peer for peer in peers if (place := place_of_peer(peer)) != request.peer.node_id}
        response, left = FindResponse(peer=self._info), MAX_VALUE_BYTES
        for key in request.keys:
            result = response.results.add()
            left -= self._add_records(key, result, left)
            near = heapq.nsmallest(N_NEIGHBORS, places, key=partial(distance, key))
            result.nearest_node_ids.extend(near)
            result.nearest_peer_ids.extend(places[place] for place in near)
        return response

    def _take(self, record: Record) -> bool:
        """A record, or every record of a dictionary; no for one that is refused or not newer."""
        if record.subkey != DICTIONARY_TAG:
            return self._put(record)
        taken = [self._put(inner) for inner, _ in unpack_dictionary(record.key, record.value)]
        return bool(taken) and all(taken)

    def _put(self, record: Record) -> bool:
        try:
            return self._store.put(record)
        except RecordError:
            return False

    def _add_records(self, key: bytes, result: FindResult, limit: int) -> int:
        found = self._store.get(key)
        if not found:
            return 0
        packed = pack_dictionary((owner, *item) for owner, item in found.items())
        if len(packed) > limit:
            return 0
        result.type, result.value = FOUND_DICTIONARY, packed
        result.expiration_time = max(item.expiration_s for item in found.values())
        return len(packed)


def _check_keys(n_keys: int, limit: int) -> None:
    if n_keys > limit:
        raise LimitExceededError("keys", n_keys, limit)


def distance(key: bytes, place: bytes) -> int:
    """Return the distance between two places in the DHT."""
    return int.from_bytes(place) ^ int.from_bytes(key)
