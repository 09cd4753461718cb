"""What the directory and the announcer need of a DHT: `DhtNode` in the product, a dictionary in tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Entry(NamedTuple):
    """One value to store: `value` is a signed record, `subkey` its owner's peer id, `expiration_s` the record's."""

    key: str
    subkey: str
    value: bytes
    expiration_s: float


class RecordStore(Protocol):
    """A place where records lie under (key, subkey) until they expire. Every call ends within a bounded time."""

    def now_s(self) -> float:
        """The time that expirations are compared with, in seconds since 1970."""

    async def store_many(self, entries: Sequence[Entry]) -> tuple[bool, ...]:
        """Store; for each entry, whether some peer took it. Raises UnavailableError."""

    async def get_many(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, bytes]]:
        """Records by key and sub-key, from all peers near each key, the latest of each. Raises UnavailableError."""

    def keep(self, entry: Entry) -> None:
        """Store this record again from time to time, so that it outlives the peers that hold it now."""
