"""The newest record that a reader has seen of each owner, key by key. Pure: time is passed in, nothing is fetched here.

Any peer may still hold, or send on purpose, an owner's older record; the record's signed version tells. A version is
remembered for as long as a record with a lower one could be alive.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from common.errors import RecordError
from protocol.admission import OPEN
from protocol.records import max_ttl_s, open_record, read_payload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from protocol.admission import Admission
    from protocol.records import Said, SignedRecord

logger = logging.getLogger(__name__)


class _Seen(NamedTuple):
    raw: bytes
    record: SignedRecord
    said: Said | None


class RecordCache:
    """Newest verified record by (key, owner)."""

    def __init__(self, admission: Admission = OPEN) -> None:
        self._admission = admission
        self._seen: dict[tuple[str, str], _Seen] = {}

    def take(self, found: Mapping[str, Mapping[str, bytes]], now_s: float) -> None:
        """Keep what is well signed, alive and newer than what is known; then forget what is long dead."""
        for key, by_owner in found.items():
            for owner, raw in by_owner.items():
                self._offer(key, owner, raw, now_s)
        self._seen = {
            name: seen for name, seen in self._seen.items() if seen.record.expiration_s + max_ttl_s(name[0]) > now_s
        }

    def live(self, now_s: float) -> Iterator[tuple[SignedRecord, Said]]:
        """Records that are neither expired nor withdrawn, and what they say."""
        for seen in self._seen.values():
            if seen.record.expiration_s > now_s and seen.said is not None:
                yield seen.record, seen.said

    def _offer(self, key: str, owner: str, raw: bytes, now_s: float) -> None:
        known = self._seen.get((key, owner))
        if known is not None and known.raw == raw:
            return
        try:
            record = open_record(raw, key=key, now_s=now_s, admission=self._admission)
        except RecordError as error:
            logger.debug("ignored a record of %s under %s: %s", owner, key, error)
            return
        if record.owner != owner or (known is not None and record.version <= known.record.version):
            logger.debug("ignored an older record of %s under %s", owner, key)
            return
        self._seen[key, owner] = _Seen(raw, record, read_payload(record))
