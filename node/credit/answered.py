"""How many pairs were answered, by peer: counted where calls end, taken by whoever reports or claims them."""

from __future__ import annotations

import threading
from typing import NamedTuple

MAX_PEERS_COUNTED = 65_536
"""Peers that one taker counts between two takes; what any more of them do is not counted."""


class PairCounts(NamedTuple):
    """Pairs, one token at one expert each, of forward and of backward calls."""

    forward: int = 0
    backward: int = 0

    def plus(self, other: PairCounts) -> PairCounts:
        """Return the sums."""
        return PairCounts(self.forward + other.forward, self.backward + other.backward)

    def at_most(self, other: PairCounts) -> PairCounts:
        """Return the smaller of each."""
        return PairCounts(min(self.forward, other.forward), min(self.backward, other.backward))


def count_pairs(counts: dict[str, PairCounts], peer_id: str, pairs: PairCounts) -> None:
    """Add a peer's pairs to its `counts`, unless it is a new one beyond MAX_PEERS_COUNTED."""
    known = counts.get(peer_id)
    if known is not None or len(counts) < MAX_PEERS_COUNTED:
        counts[peer_id] = pairs if known is None else known.plus(pairs)


class AnsweredPairs:
    """What peers have answered, for several takers that each take it at their own pace. Safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._takers: list[PairsTaker] = []

    def taker(self) -> PairsTaker:
        """Return one more, which gets what is counted from now on."""
        taker = PairsTaker(self._lock)
        with self._lock:
            self._takers.append(taker)
        return taker

    def add(self, peer_id: str, pairs: PairCounts) -> None:
        """Count what a peer has answered, or was answered."""
        with self._lock:
            for taker in self._takers:
                taker.add(peer_id, pairs)


class PairsTaker:
    """Counts between two takes. Made by `AnsweredPairs`."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._counts: dict[str, PairCounts] = {}

    def add(self, peer_id: str, pairs: PairCounts) -> None:
        """Count pairs; the caller holds the lock."""
        count_pairs(self._counts, peer_id, pairs)

    def take(self) -> dict[str, PairCounts]:
        """Return what was counted since the last call, by peer id."""
        with self._lock:
            taken, self._counts = self._counts, {}
        return taken
