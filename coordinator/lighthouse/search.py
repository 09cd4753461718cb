"""A search for keys in the DHT, as a state machine: whom to ask next, and what was found. No sockets, no clock.

Whoever is asked for one key is asked for all that it is near to at once. A search ends by itself: every peer is asked
at most once for a key, and at most MAX_CALLS calls are made.
"""

from __future__ import annotations

import contextlib
import heapq
from typing import TYPE_CHECKING

from common.errors import RecordError
from coordinator.lighthouse.hivemind_pb2 import FOUND_DICTIONARY
from dht.packing import place_of_peer, unpack_dictionary, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coordinator.lighthouse.hivemind_pb2 import FindResponse

N_NEAREST = 8
"""Peers that are asked for each key: more than store a record, since peers come and go."""

MAX_KEYS_PER_CALL = 64
MAX_CALLS = 256
MAX_CANDIDATES = 1024
MAX_NEIGHBORS = 64
"""Peers that one answer may name for one key."""


class KeySearch:
    """Searches for `keys` (name by place) from `peers` on, without `me`; `take` gets an answer's records by owner."""

    def __init__(
        self,
        keys: dict[bytes, str],
        peers: Iterable[bytes],
        me: bytes,
        take: Callable[[str, dict[str, bytes]], None] | None = None,
    ) -> None:
        self._keys, self._me, self._take = keys, me, take
        self._places: dict[bytes, int] = {}
        self._asked: dict[bytes, set[bytes]] = {}
        self._failed: set[bytes] = set()
        self._calls = 0
        self.answered_by: set[bytes] = set()
        self._add(peers)

    @property
    def peers(self) -> set[bytes]:
        """Everybody that was named, but for those that did not answer."""
        return self._places.keys() - self._failed

    def next_calls(self) -> dict[bytes, list[bytes]]:
        """Places to ask each peer for, now; empty at the end. Every one of them is to be reported on."""
        calls: dict[bytes, list[bytes]] = {}
        for place in self._keys:
            for peer in self._nearest(place):
                if place not in self._asked.setdefault(peer, set()) and len(calls.get(peer, ())) < MAX_KEYS_PER_CALL:
                    calls.setdefault(peer, []).append(place)
        allowed = dict(list(calls.items())[: MAX_CALLS - self._calls])
        self._calls += len(allowed)
        for peer, places in allowed.items():
            self._asked[peer].update(places)
        return allowed

    def answered(self, peer: bytes, places: Sequence[bytes], response: FindResponse) -> None:
        """A peer's answer to a call. Who reads the records checks them."""
        self.answered_by.add(peer)
        for place, result in zip(places, response.results, strict=False):
            if self._take is not None and result.type == FOUND_DICTIONARY:
                self._take(self._keys[place], _records(place, result.value))
            self._add(result.nearest_peer_ids[:MAX_NEIGHBORS])

    def failed(self, peer: bytes) -> None:
        """A call had no answer."""
        self._failed.add(peer)

    def _nearest(self, place: bytes) -> list[bytes]:
        wanted = int.from_bytes(place)
        places = self._places
        return heapq.nsmallest(N_NEAREST, self.peers, key=lambda peer: places[peer] ^ wanted)

    def _add(self, peers: Iterable[bytes]) -> None:
        for peer in peers:
            if peer != self._me and len(self._places) < MAX_CANDIDATES:
                self._places.setdefault(peer, int.from_bytes(place_of_peer(peer)))


def _records(place: bytes, packed: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for record, owner in unpack_dictionary(place, packed):
        with contextlib.suppress(RecordError):
            found[owner] = unwrap(record.value)
    return found
