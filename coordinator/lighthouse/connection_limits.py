"""How much of a lighthouse one stranger can take, and all together: connections and streams, counted. Pure."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

MAX_STREAMS = 2048
MAX_STREAMS_PER_PEER = 64
MAX_CONNECTIONS_PER_ADDRESS = 128
"""Counted by address: before a peer has proven who it is, nothing else is known of it."""

MAX_UNREAD_BYTES = 16 << 20
"""The most unread bytes of one connection, over all its streams: a peer that ignores flow control is cut off."""


class ConnectionLimit:
    """At most `total` at a time, at most `each` of the same holder."""

    def __init__(self, total: int, each: int) -> None:
        self._total, self._each = total, each
        self._held: Counter[Hashable] = Counter()
        self.refused = 0

    @property
    def n_held(self) -> int:
        """Places that are taken."""
        return self._held.total()

    @contextmanager
    def place(self, holder: Hashable) -> Iterator[bool]:
        """Hold a place while the context lasts, if there is one; whether there is."""
        free = self.n_held < self._total and self._held[holder] < self._each
        if not free:
            self.refused += 1
            yield False
            return
        self._held[holder] += 1
        try:
            yield True
        finally:
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]
