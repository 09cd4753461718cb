"""Which records a node takes in: from a peer that stores here, and from a peer that answers a lookup.

hivemind asks `RecordValidator` before it stores or returns anything. A record's value in hivemind is our signed record
wrapped by msgpack; the key is a hash; the sub-key is the owner's peer id wrapped by msgpack.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.utils import MSGPackSerializer

from protocol.errors import RecordError
from protocol.records import MAX_RECORD_BYTES, SignedRecord, check_time, parse_key, verify_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

MAX_STORED_KEYS = 65_536
MAX_SUBKEYS = 1024
"""Owners under one key: at ~350 bytes a record this keeps an answer below libp2p's 4 MB message."""

MAX_VERIFIED = 8192
"""Records whose signature is remembered as good; each lookup brings every record from several peers."""

WRAPPING_BYTES = 3


class RecordChecker:
    """Unwraps and verifies records, each byte string once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._verified: OrderedDict[bytes, SignedRecord] = OrderedDict()

    def check(self, record: DHTRecord) -> SignedRecord:
        """The signed record inside hivemind's; raises RecordError unless its every part fits the other."""
        raw = unwrap(record.value)
        signed = self._verify(raw)
        if DHTID.generate(source=signed.key).to_bytes() != record.key:
            raise RecordError(f"key: the record is signed for {signed.key!r}, not for the key it came under")
        if MSGPackSerializer.dumps(signed.owner) != record.subkey:
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
        signed = verify_record(raw)
        self._verified[raw] = signed
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return signed


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Refuses what `RecordChecker` refuses, what there is no room for and, after `serve_only`, other runs' records."""

    def __init__(self, checker: RecordChecker) -> None:
        self._checker = checker
        self._storage: Any = None
        self._manifest: Manifest | None = None

    def attach(self, storage: Any) -> None:  # noqa: ANN401
        """Set the hivemind storage whose size is bounded."""
        self._storage = storage

    def serve_only(self, manifest: Manifest) -> None:
        """From now on store only records of this run and of blocks that its model has."""
        self._manifest = manifest

    def validate(self, record: DHTRecord) -> bool:
        """Called by hivemind for every record that comes in or is stored by this node itself."""
        try:
            signed = self._checker.check(record)
            self._check_belongs(signed)
            self._check_room(record, signed)
        except RecordError as error:
            logger.debug("refused a record: %s", error)
            return False
        return True

    def _check_belongs(self, signed: SignedRecord) -> None:
        if self._manifest is None:
            return
        key = parse_key(signed.key)
        if key.run_id != self._manifest.run_id:
            raise RecordError(f"key: this node serves run {self._manifest.run_id} only")
        model, block = self._manifest.model, key.block
        if block is not None and (block.layer >= model.n_layers or block.block >= model.blocks_per_layer):
            raise RecordError(f"key: the run has no block {block}")

    def _check_room(self, record: DHTRecord, signed: SignedRecord) -> None:
        """Full means that newcomers are refused; who is in already can go on renewing."""
        if self._storage is None:
            return
        stored = self._storage.get(DHTID.from_bytes(record.key))
        if stored is None:
            if len(self._storage) >= MAX_STORED_KEYS:
                raise RecordError(f"store: full ({MAX_STORED_KEYS} keys)")
        elif len(stored.value) >= MAX_SUBKEYS and signed.owner not in stored.value:
            raise RecordError(f"store: full ({MAX_SUBKEYS} owners under {signed.key!r})")


def unwrap(value: object) -> bytes:
    """The signed record in a hivemind value; raises RecordError unless it is wrapped the one way that hivemind does."""
    if not isinstance(value, bytes) or not value or len(value) > MAX_RECORD_BYTES + WRAPPING_BYTES:
        raise RecordError(f"value: must be 1 to {MAX_RECORD_BYTES + WRAPPING_BYTES} bytes")
    header = {0xC4: 2, 0xC5: 3}.get(value[0], 0)  # msgpack bin 8, bin 16
    raw = value[header:]
    if not header or wrap(raw) != value:
        raise RecordError("value: not a byte string wrapped by msgpack")
    return raw


def wrap(raw: bytes) -> bytes:
    """A signed record as hivemind keeps it."""
    return bytes(MSGPackSerializer.dumps(raw))
