"""Records as hivemind's DHT carries them, and what is checked of them. Imports no hivemind, so that a lighthouse can.

A record's value is our signed record wrapped by msgpack; its key is a hash; its sub-key is the owner's peer id wrapped
by msgpack. A dictionary of records is a msgpack extension type around [size, latest, [[owner, value, expiration]]].
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgpack  # type: ignore[import-untyped]

from common.errors import RecordError
from protocol.admission import OPEN
from protocol.records import MAX_RECORD_BYTES, SignedRecord, check_time, parse_key, verify_record

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from dht.record_store import Entry
    from protocol.admission import Admission
    from protocol.manifest import ModelConfig

logger = logging.getLogger(__name__)

MAX_STORED_KEYS = 65_536
MAX_SUBKEYS = 1024
"""Owners under one key: at ~350 bytes a record this keeps an answer below libp2p's 4 MB message."""

MAX_REPORTING = 256
"""The same of a run's reports, which may be ten times as long."""

MAX_VERIFIED = 8192
"""Records whose signature is remembered as good; each lookup brings every record from several peers."""

MAX_KEYS_PER_REQUEST = 4096
WRAPPING_BYTES = 3
DICTIONARY_TAG = b""
"""The tag in place of a sub-key that says that the value is a whole dictionary."""

_DICTIONARY_EXT = 0x50  # hivemind.dht.storage


class Carried(Protocol):
    """A record as it travels, hivemind's `DHTRecord` or ours."""

    @property
    def key(self) -> bytes:
        """SHA-1 of the key, as `place_of_key` makes it."""

    @property
    def subkey(self) -> bytes:
        """The owner's peer id, wrapped."""

    @property
    def value(self) -> bytes:
        """The signed record, wrapped."""

    @property
    def expiration_time(self) -> float:
        """Seconds since 1970."""


class Record(NamedTuple):
    """What `Carried` describes."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


class RecordChecker:
    """Unwraps and verifies records, each byte string once; in a closed run only those of peers that take part."""

    def __init__(self, clock: Callable[[], float], admission: Admission = OPEN) -> None:
        self._clock, self._admission = clock, admission
        self._verified: OrderedDict[bytes, SignedRecord] = OrderedDict()

    def check(self, record: Carried) -> SignedRecord:
        """The signed record inside hivemind's; raises RecordError unless its every part fits the other."""
        raw = unwrap(record.value)
        signed = self._verify(raw)
        if place_of_key(signed.key) != record.key:
            raise RecordError(f"key: the record is signed for {signed.key!r}, not for the key it came under")
        if pack(signed.owner) != record.subkey:
            raise RecordError("subkey: not the owner's peer id")
        # hivemind keeps whichever value expires last, so an old record must not come with a later time than its own.
        if record.expiration_time != signed.expiration_s:
            raise RecordError("expiration: not the one that was signed")
        check_time(signed, self._clock())
        return signed

    def _verify(self, raw: bytes) -> SignedRecord:
        known = self._verified.get(raw)
        if known is not None:
            self._verified.move_to_end(raw)
            return known
        signed = verify_record(raw, self._admission)
        self._verified[raw] = signed
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return signed


def check_in_run(signed: SignedRecord, run_id: str, model: ModelConfig | None) -> None:
    """Raise RecordError for a record of another run, or of a block that the run's model, once known, does not have."""
    key = parse_key(signed.key)
    if key.run_id != run_id:
        raise RecordError(f"key: this node serves run {run_id} only")
    block = key.block
    if model and block and (block.layer >= model.n_layers or block.block >= model.blocks_per_layer):
        raise RecordError(f"key: the run has no block {block}")


def place_of_peer(peer: bytes) -> bytes:
    """A node's place in the DHT: fixed by its peer id, so that nobody can choose to sit beside a key."""
    return hashlib.sha1(peer, usedforsecurity=False).digest()


def place_of_key(key: str) -> bytes:
    """A key's place among the nodes."""
    return hashlib.sha1(pack(key), usedforsecurity=False).digest()


def pack(value: object) -> bytes:
    """Pack a value as hivemind packs keys and sub-keys."""
    return bytes(msgpack.packb(value, use_bin_type=True, strict_types=True))


def wrap(raw: bytes) -> bytes:
    """A signed record as hivemind keeps it."""
    return pack(raw)


def unwrap(value: object) -> bytes:
    """The signed record in a hivemind value; raises RecordError unless it is wrapped the one way that hivemind does."""
    if not isinstance(value, bytes) or not value or len(value) > MAX_RECORD_BYTES + WRAPPING_BYTES:
        raise RecordError(f"value: must be 1 to {MAX_RECORD_BYTES + WRAPPING_BYTES} bytes")
    header = {0xC4: 2, 0xC5: 3}.get(value[0], 0)  # msgpack bin 8, bin 16
    raw = value[header:]
    if not header or wrap(raw) != value:
        raise RecordError("value: not a byte string wrapped by msgpack")
    return raw


def carried(entry: Entry) -> Record:
    """A signed record as it travels."""
    return Record(place_of_key(entry.key), pack(entry.subkey), wrap(entry.value), entry.expiration_s)


def check_capacity(n_keys: int, owners: Collection[str] | None, signed: SignedRecord) -> None:
    """Raise RecordError if a store of `n_keys` has no place for a record; `owners` are those under its key, if any.

    Full means that newcomers are refused; who is in already can go on renewing.
    """
    limit = MAX_REPORTING if parse_key(signed.key).topic == "reports" else MAX_SUBKEYS
    if owners is None:
        if n_keys >= MAX_STORED_KEYS:
            raise RecordError(f"store: full ({MAX_STORED_KEYS} keys)")
    elif len(owners) >= limit and signed.owner not in owners:
        raise RecordError(f"store: full ({limit} owners under one key)")


def pack_dictionary(items: Iterable[tuple[str, bytes, float]]) -> bytes:
    """(owner, wrapped value, expiration) as hivemind's dictionary; of at least one item."""
    rows: list[list[Any]] = [list(item) for item in items]
    latest_s = max(row[2] for row in rows)
    return pack(msgpack.ExtType(_DICTIONARY_EXT, pack([None, latest_s, rows])))


def unpack_dictionary(key: bytes, packed: bytes) -> Iterator[tuple[Record, str]]:
    """Records and their owners in a peer's dictionary, at most MAX_SUBKEYS, nothing about them checked but types."""
    try:
        outer = msgpack.unpackb(packed)
        if not isinstance(outer, msgpack.ExtType) or outer.code != _DICTIONARY_EXT:
            return
        _, _, items = msgpack.unpackb(outer.data)
        for owner, value, expiration_s in items[:MAX_SUBKEYS]:
            if isinstance(owner, str) and isinstance(value, bytes) and isinstance(expiration_s, float):
                yield Record(key, pack(owner), value, expiration_s), owner
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        logger.debug("ignored a dictionary that cannot be unpacked: %s", error)
