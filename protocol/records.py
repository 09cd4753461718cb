"""Records: what peers say about themselves in the DHT, signed, versioned, expiring, checked field by field.

A record says one thing under one (key, owner): a replica, a peer, a trainer's report, or a run's manifest.
`open_record` is the only way in: it checks size, encoding, signature, owner, time and payload, in that order, and
believes nothing before.
"""

from __future__ import annotations

import hashlib
import re
import struct
import tomllib
from dataclasses import dataclass
from typing import Literal, NamedTuple

from common.errors import IdentityError, ManifestError, RecordError
from protocol import limits, records_pb2
from protocol.admission import NOT_INVITED, OPEN, TICKET_BYTES, Admission
from protocol.announcements import (
    MAX_ANNOUNCE_PAYLOAD_BYTES,
    MAX_RECORD_VERSION,
    MAX_TIME_S,
    BlockRecord,
    PeerRecord,
    check_length,
    check_range,
    decode_block,
    decode_peer,
    parse_record,
)
from protocol.identity import Identity, peer_id_of, verify
from protocol.manifest import HASH_CHARS, MAX_TOML_BYTES, TRUNK, BlockId, Manifest
from protocol.reports import MAX_REPORT_PAYLOAD_BYTES, TrainerReport, decode_report
from protocol.version import HOW_TO_UPDATE, PROTOCOL_VERSION

MAX_MANIFEST_PAYLOAD_BYTES = MAX_TOML_BYTES + 8
MAX_RECORD_BYTES = MAX_MANIFEST_PAYLOAD_BYTES + 512
"""Any signed record; refused by its length before a byte of it is parsed."""

MAX_ANNOUNCE_TTL_S = 300.0
"""Life of every record but a manifest's: a host that is gone is forgotten within this time at worst."""

MAX_MANIFEST_TTL_S = 30 * 86_400.0
"""A run outlives its owner's last signature by this time."""

_MAX_PAYLOAD_BYTES = {
    "block": MAX_ANNOUNCE_PAYLOAD_BYTES,
    "peers": MAX_ANNOUNCE_PAYLOAD_BYTES,
    "reports": MAX_REPORT_PAYLOAD_BYTES,
    "manifest": MAX_MANIFEST_PAYLOAD_BYTES,
}

_DOMAIN = b"record/2"
_KEY = re.compile(
    rf"(?P<run>[A-Za-z0-9_-]{{1,{limits.MAX_RUN_ID_CHARS}}})/(?:(?P<topic>peers|reports|manifest|trunk)|"
    r"(?P<layer>0|[1-9][0-9]{0,4})/(?P<block>0|[1-9][0-9]{0,8}))"
)


Said = BlockRecord | PeerRecord | TrainerReport
"""What a record says, unless it is a manifest's."""


class RecordKey(NamedTuple):
    """A key of the DHT, taken apart: `block` is None for all that is not about one."""

    run_id: str
    topic: Literal["block", "peers", "reports", "manifest"]
    block: BlockId | None


@dataclass(frozen=True, kw_only=True)
class SignedRecord:
    """A record whose signature holds. `expiration_s` is absolute, in seconds since 1970; `ticket`: of a closed run."""

    key: str
    owner: str
    version: int
    expiration_s: float
    payload: bytes
    ticket: bytes = b""

    @property
    def withdrawn(self) -> bool:
        """The owner takes back what it said under this key."""
        return not self.payload


def block_key(run_id: str, block: BlockId) -> str:
    """Key of a block's replicas: one sub-key per owner."""
    return f"{run_id}/{block}"


def peers_key(run_id: str) -> str:
    """Key of a run's peers: one sub-key per peer."""
    return f"{run_id}/peers"


def reports_key(run_id: str) -> str:
    """Key of what a run's trainers measured: one sub-key per trainer."""
    return f"{run_id}/reports"


def manifest_key(run_id: str) -> str:
    """Key of a run's manifest: its one sub-key is the run's owner."""
    return f"{run_id}/manifest"


def parse_key(key: str) -> RecordKey:
    """Take a key apart; raises RecordError for one that no builder above makes."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise RecordError(f"key: {key[:80]!r} is not RUN/LAYER/BLOCK or RUN and one of trunk, peers, reports, manifest")
    match match["topic"]:
        case "trunk":
            return RecordKey(match["run"], "block", TRUNK)
        case "peers" | "reports" | "manifest" as topic:
            return RecordKey(match["run"], topic, None)
    block = BlockId(int(match["layer"]), int(match["block"]))
    check_range("key: layer", block.layer, limits.MAX_LAYERS - 1)
    check_range("key: block", block.block, limits.MAX_EXPERTS_PER_LAYER - 1)
    return RecordKey(match["run"], "block", block)


def max_ttl_s(key: str) -> float:
    """Longest life, in seconds, of a record under `key`."""
    return MAX_MANIFEST_TTL_S if parse_key(key).topic == "manifest" else MAX_ANNOUNCE_TTL_S


def sign_record(
    identity: Identity, *, key: str, version: int, expiration_s: float, payload: bytes, ticket: bytes = b""
) -> bytes:
    """Sign one record as its owner; its sub-key is the owner's peer id. An empty payload withdraws."""
    record = SignedRecord(
        key=key,
        owner=identity.peer_id,
        version=version,
        expiration_s=float(expiration_s),
        payload=payload,
        ticket=ticket,
    )
    _check_envelope(record)
    _check_payload(record)
    signature = identity.sign(_DOMAIN, _signed_bytes(record))
    return _encode(record, identity.public_key, signature)


def open_record(raw: bytes, *, key: str, now_s: float, admission: Admission = OPEN) -> SignedRecord:
    """Check a record that came from a peer and was asked for under `key`.

    Raises:
        RecordError: it is oversize, malformed, forged, another key's, expired or signed too far into the future, or
            its owner does not take part in a closed run.
    """
    record = verify_record(raw, admission)
    if record.key != key:
        raise RecordError(f"key: the record is signed for {record.key!r}, not for {key[:80]!r}")
    check_time(record, now_s)
    return record


def verify_record(raw: bytes, admission: Admission = OPEN) -> SignedRecord:
    """Everything that `open_record` checks but the expected key and the time: true once, true for ever."""
    if len(raw) > MAX_RECORD_BYTES:
        raise RecordError(f"record: is {len(raw)} bytes, but the limit is {MAX_RECORD_BYTES}")
    message = parse_record(records_pb2.SignedRecord, raw)
    if message.protocol_version != PROTOCOL_VERSION:
        raise RecordError(
            f"protocol_version: the record speaks {message.protocol_version}, this kilohive speaks {PROTOCOL_VERSION}; "
            f"{HOW_TO_UPDATE}"
        )
    record = SignedRecord(
        key=message.key,
        owner=message.subkey,
        version=message.version,
        expiration_s=message.expiration_s,
        payload=message.payload,
        ticket=message.ticket,
    )
    if _encode(record, message.public_key, message.signature) != raw:
        raise RecordError("record: not in canonical encoding")
    _check_envelope(record)
    _check_signature(record, message.public_key, message.signature)
    _check_admitted(record, admission)
    _check_payload(record)
    return record


def check_time(record: SignedRecord, now_s: float) -> None:
    """Raise RecordError unless the record expires after `now_s` and no later than its kind may."""
    left_s = record.expiration_s - now_s
    if left_s <= 0:
        raise RecordError(f"expiration_s: expired {-left_s:.1f} s ago; check that this machine's clock is right")
    if left_s > max_ttl_s(record.key):
        raise RecordError(f"expiration_s: {left_s:.1f} s ahead, but the limit is {max_ttl_s(record.key)} s")


def read_payload(record: SignedRecord) -> Said | None:
    """What a record that is no manifest's says; None if it is withdrawn. Raises RecordError."""
    key = parse_key(record.key)
    if record.withdrawn:
        return None
    if key.topic == "peers":
        return decode_peer(record.payload)
    if key.topic == "reports":
        return decode_report(record.payload)
    said = decode_block(record.payload)
    if said.block != key.block:
        raise RecordError(f"block: the payload is about {said.block}, its key about {key.block}")
    return said


def encode_manifest(manifest: Manifest) -> bytes:
    """Payload of a manifest's record."""
    return records_pb2.ManifestRecord(toml=manifest.to_toml()).SerializeToString(deterministic=True)


def decode_manifest(record: SignedRecord) -> Manifest:
    """The manifest that the run id in the record's key names.

    Raises:
        RecordError: the record holds another text, or someone other than the run's owner signed it.
        ManifestError: it is the right one, but this version of the program cannot read it.
    """
    try:
        return Manifest.from_toml(_manifest_text(record))
    except (ValueError, OverflowError) as error:
        raise ManifestError(f"manifest: a number in it is out of range ({error})") from error


def _manifest_text(record: SignedRecord) -> str:
    """The text, proven by the hash in the run id and signed by the owner that it names, if nothing else about it."""
    toml = parse_record(records_pb2.ManifestRecord, record.payload).toml
    run_id = parse_key(record.key).run_id
    name, _, digest = run_id.rpartition("-")
    if hashlib.sha256(toml.encode()).hexdigest()[:HASH_CHARS] != digest:
        raise RecordError(f"manifest: is not the one that run id {run_id} names")
    try:
        table = tomllib.loads(toml)
    except (ValueError, RecursionError) as error:  # not TOML; or tomllib on huge numbers and deep nesting
        raise RecordError(f"manifest of {run_id}: not TOML ({type(error).__name__})") from error
    if table.get("name") != name or table.get("owner") != record.owner:
        raise RecordError(f"manifest of {run_id}: names another run, or another owner than {record.owner}")
    return toml


def _check_envelope(record: SignedRecord) -> None:
    key = parse_key(record.key)
    check_range("record version", record.version, MAX_RECORD_VERSION)
    check_range("expiration_s", record.expiration_s, MAX_TIME_S)
    check_length(record.payload, _MAX_PAYLOAD_BYTES[key.topic])
    if len(record.ticket) not in {0, TICKET_BYTES}:
        raise RecordError(f"ticket: must be {TICKET_BYTES} bytes or none, is {len(record.ticket)}")


def _check_admitted(record: SignedRecord, admission: Admission) -> None:
    """A manifest needs no ticket: the run id itself tells who may sign it."""
    if parse_key(record.key).topic != "manifest" and not admission.admits(record.owner, record.ticket):
        raise RecordError(f"ticket: {NOT_INVITED}")


def _check_payload(record: SignedRecord) -> None:
    if parse_key(record.key).topic == "manifest":
        _manifest_text(record)
    else:
        read_payload(record)


def _check_signature(record: SignedRecord, public_key: bytes, signature: bytes) -> None:
    try:
        if peer_id_of(public_key) != record.owner:
            raise RecordError(f"subkey: {record.owner[:60]!r} is not the peer id of the public key")
        verify(public_key, _DOMAIN, _signed_bytes(record), signature)
    except IdentityError as error:
        raise RecordError(f"record {record.key!r}: {error}") from None


def _signed_bytes(record: SignedRecord) -> bytes:
    """Fields in order, each with its length, so that no two records share a byte string."""
    fields = [
        record.key.encode(),
        record.owner.encode(),
        struct.pack(">Qd", record.version, record.expiration_s),
        record.payload,
        struct.pack(">I", PROTOCOL_VERSION),
    ]
    if record.ticket:
        fields.append(record.ticket)
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)


def _encode(record: SignedRecord, public_key: bytes, signature: bytes) -> bytes:
    return records_pb2.SignedRecord(
        key=record.key,
        subkey=record.owner,
        version=record.version,
        expiration_s=record.expiration_s,
        payload=record.payload,
        public_key=public_key,
        signature=signature,
        protocol_version=PROTOCOL_VERSION,
        ticket=record.ticket,
    ).SerializeToString(deterministic=True)
