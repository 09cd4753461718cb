"""The records that a lighthouse keeps for others: only what `dht.packing` accepts, bounded, until they expire."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from common.errors import RecordError
from dht.packing import Record, RecordChecker, check_capacity, check_in_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.admission import Admission
    from protocol.manifest import ModelConfig

MAX_STORE_BYTES = 256 << 20
"""The most bytes of values: what a small machine has to spare."""


class Item(NamedTuple):
    """One owner's record: `value` is the signed record, wrapped."""

    value: bytes
    expiration_s: float


class StoredRecords:
    """Records by key and owner of one run; `clock` gives seconds since 1970."""

    def __init__(self, admission: Admission, clock: Callable[[], float], max_bytes: int = MAX_STORE_BYTES) -> None:
        self._run_id, self._clock, self._max_bytes = admission.run_id, clock, max_bytes
        self._model: ModelConfig | None = None
        self._checker = RecordChecker(clock, admission)
        self._keys: dict[bytes, dict[str, Item]] = {}
        self.n_bytes = 0

    @property
    def n_records(self) -> int:
        """Records kept, those that have expired since `expire` too."""
        return sum(len(owners) for owners in self._keys.values())

    def serve_only(self, model: ModelConfig) -> None:
        """Take only records of blocks that the run's model has, from now on."""
        self._model = model

    def put(self, record: Record) -> bool:
        """Keep a peer's record; False if the one that is kept expires no sooner.

        Raises:
            RecordError: malformed, forged, expired, another run's or an uninvited peer's, or there is no room for it.
        """
        signed = self._checker.check(record)
        check_in_run(signed, self._run_id, self._model)
        known = self._keys.get(record.key, {}).get(signed.owner)
        if known is not None and known.expiration_s >= record.expiration_time:
            return False
        added = len(record.value) - (len(known.value) if known else 0)
        if self.n_bytes + added > self._max_bytes:
            raise RecordError(f"store: full ({self._max_bytes} bytes)")
        check_capacity(len(self._keys), self._keys.get(record.key), signed)
        self._keys.setdefault(record.key, {})[signed.owner] = Item(record.value, record.expiration_time)
        self.n_bytes += added
        return True

    def get(self, key: bytes) -> dict[str, Item]:
        """Live records under a key, by owner."""
        now_s = self._clock()
        return {owner: item for owner, item in self._keys.get(key, {}).items() if item.expiration_s > now_s}

    def expire(self) -> None:
        """Drop what has expired."""
        self._keys = {key: live for key in self._keys if (live := self.get(key))}
        self.n_bytes = sum(len(item.value) for owners in self._keys.values() for item in owners.values())
