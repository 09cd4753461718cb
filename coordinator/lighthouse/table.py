"""Which members of the DHT a lighthouse knows. Pure: time is passed in, nobody is called here.

Kademlia's rule: of those at about the same distance a few are kept, and one that has answered for long is not given up
for a newcomer, so that somebody with many identities cannot push the others out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dht.packing import place_of_peer

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET_SIZE = 32
"""Members at about one distance."""

MAX_FAILURES = 2
"""Calls in a row without an answer; then a member is forgotten."""


class _Seen(NamedTuple):
    last_s: float
    failures: int


class RoutingTable:
    """Members by peer id, as the node whose peer id is `me`."""

    def __init__(self, me: bytes) -> None:
        self._me = me
        self._place = int.from_bytes(place_of_peer(me))
        self._seen: dict[bytes, _Seen] = {}
        self._buckets: dict[int, set[bytes]] = {}

    def __len__(self) -> int:
        """Members."""
        return len(self._seen)

    def __contains__(self, peer: bytes) -> bool:
        """Whether a peer is a member that is known."""
        return peer in self._seen

    def __iter__(self) -> Iterator[bytes]:
        """Peer ids of all members."""
        return iter(tuple(self._seen))

    def heard_from(self, peer: bytes, now_s: float) -> bool:
        """A member has called or answered; whether it is in the table now."""
        if peer == self._me:
            return False
        bucket = self._buckets.setdefault(self._distance_bits(peer), set())
        if peer not in bucket and len(bucket) >= BUCKET_SIZE:
            return False
        bucket.add(peer)
        self._seen[peer] = _Seen(now_s, 0)
        return True

    def silent(self, peer: bytes) -> None:
        """A member has not answered a call."""
        seen = self._seen.get(peer)
        if seen is None:
            return
        if seen.failures + 1 >= MAX_FAILURES:
            self._forget(peer)
        else:
            self._seen[peer] = seen._replace(failures=seen.failures + 1)

    def quiet_since(self, before_s: float) -> list[bytes]:
        """Members that were last heard from before a time, those that were silent longest first."""
        quiet = [(seen.last_s, peer) for peer, seen in self._seen.items() if seen.last_s < before_s]
        return [peer for _, peer in sorted(quiet)]

    def _forget(self, peer: bytes) -> None:
        del self._seen[peer]
        self._buckets[self._distance_bits(peer)].discard(peer)

    def _distance_bits(self, peer: bytes) -> int:
        return (int.from_bytes(place_of_peer(peer)) ^ self._place).bit_length()
