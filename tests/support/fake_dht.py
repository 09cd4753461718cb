"""A DHT in a dictionary, with a clock that a test moves. Keeps hivemind's rule: what expires last wins."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.record_store import Entry

START_S = 1_800_000_000.0


@dataclass
class FakeDht:
    """`down` makes every call fail; `lost_keys` are left out of answers; `calls` counts lookups, `looked_up` tells."""

    time_s: float = START_S
    down: bool = False
    lost_keys: set[str] = field(default_factory=set)
    calls: int = 0
    looked_up: asyncio.Event = field(default_factory=asyncio.Event)
    stored: dict[str, dict[str, Entry]] = field(default_factory=dict)
    kept: list[Entry] = field(default_factory=list)

    def now_s(self) -> float:
        return self.time_s

    async def store_many(self, entries: Sequence[Entry]) -> tuple[bool, ...]:
        self._check_up()
        return tuple(self._store(entry) for entry in entries)

    async def get_many(self, keys: Sequence[str]) -> dict[str, dict[str, bytes]]:
        self._check_up()
        self.calls += 1
        self.looked_up.set()
        return {key: self._live(key) for key in keys if key not in self.lost_keys}

    def keep(self, entry: Entry) -> None:
        self.kept.append(entry)

    def put(self, entry: Entry) -> None:
        """What a peer does that does not keep the rule."""
        self.stored.setdefault(entry.key, {})[entry.subkey] = entry

    def _live(self, key: str) -> dict[str, bytes]:
        return {
            subkey: entry.value
            for subkey, entry in self.stored.get(key, {}).items()
            if entry.expiration_s > self.time_s
        }

    def _store(self, entry: Entry) -> bool:
        known = self.stored.get(entry.key, {}).get(entry.subkey)
        if entry.expiration_s <= self.time_s or (known is not None and known.expiration_s >= entry.expiration_s):
            return False
        self.put(entry)
        return True

    def _check_up(self) -> None:
        if self.down:
            raise UnavailableError("dht: no answer")
