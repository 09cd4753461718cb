"""Records: what peers say about themselves in the DHT, signed, versioned, expiring, checked field by field.

A record says one thing under one (key, owner): a replica, a peer, or a run's manifest. `open_record` is the only
way in: it checks size, encoding, signature, owner, time and payload, in that order, and believes nothing before.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import tomllib
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar, get_args

from google.protobuf.message import DecodeError, Message

from protocol import limits, records_pb2
from protocol.errors import IdentityError, ManifestError, RecordError
from protocol.identity import Identity, peer_id_of, verify
from protocol.manifest import HASH_CHARS, MAX_TOML_BYTES, BlockId, Manifest

MAX_MANIFEST_PAYLOAD_BYTES = MAX_TOML_BYTES + 8
MAX_ANNOUNCE_PAYLOAD_BYTES = 512
MAX_RECORD_BYTES = MAX_MANIFEST_PAYLOAD_BYTES + 512
"""Any signed record; refused by its length before a byte of it is parsed."""

MAX_ANNOUNCE_TTL_S = 300.0
"""Life of a block's or peer's record: a host that is gone is forgotten within this time at worst."""

MAX_MANIFEST_TTL_S = 30 * 86_400.0
"""A run outlives its owner's last signature by this time."""

MAX_RECORD_VERSION = (1 << 63) - 1
MAX_ENDPOINT_CHARS = 261
"""255 characters of host name, brackets, colon, port."""

MAX_SOFTWARE_CHARS = 64
MAX_TOKENS_PER_S = 1e15
MAX_TIME_S = 1e11
MAX_UINT32 = (1 << 32) - 1

Role = Literal["host", "trainer", "coordinator"]
ROLES: Final = get_args(Role)

_DOMAIN = b"record/1"
_KEY = re.compile(
    rf"(?P<run>[A-Za-z0-9_-]{{1,{limits.MAX_RUN_ID_CHARS}}})/(?:(?P<topic>peers|manifest)|"
    r"(?P<layer>0|[1-9][0-9]{0,4})/(?P<block>0|[1-9][0-9]{0,8}))"
)
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,253}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MAX_PORT = 65_535

M = TypeVar("M", bound=Message)


class RecordKey(NamedTuple):
    """A key of the DHT, taken apart: `block` is None for the run's peers and its manifest."""

    run_id: str
    topic: Literal["block", "peers", "manifest"]
    block: BlockId | None


@dataclass(frozen=True, kw_only=True)
class SignedRecord:
    """A record whose signature holds. `expiration_s` is absolute, in seconds since 1970."""

    key: str
    owner: str
    version: int
    expiration_s: float
    payload: bytes

    @property
    def withdrawn(self) -> bool:
        """The owner takes back what it said under this key."""
        return not self.payload


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One replica of one block, as its owner describes it; `version` counts its optimizer steps.

    Queue and rates are the whole peer's: its blocks share one runtime.
    """

    block: BlockId
    version: int
    endpoint: str
    queue_tokens: int = 0
    tokens_per_s: float = 0.0
    tokens_total: int = 0
    n_experts: int = 0

    def __post_init__(self) -> None:
        _check_endpoint(self.endpoint)
        _check_range("layer", self.block.layer, limits.MAX_LAYERS - 1)
        _check_range("block", self.block.block, limits.MAX_EXPERTS_PER_LAYER - 1)
        _check_range("version", self.version, MAX_RECORD_VERSION)
        _check_range("queue_tokens", self.queue_tokens, MAX_UINT32)
        _check_range("tokens_per_s", self.tokens_per_s, MAX_TOKENS_PER_S)
        _check_range("tokens_total", self.tokens_total, limits.MAX_RUN_TOKENS)
        _check_range("n_experts", self.n_experts, limits.MAX_EXPERTS_PER_LAYER)


@dataclass(frozen=True, kw_only=True)
class PeerRecord:
    """One peer of a run, as it describes itself; an empty endpoint means that nothing listens."""

    role: Role
    endpoint: str = ""
    software: str = ""
    started_s: float = 0.0
    n_blocks: int = 0
    tokens_per_s: float = 0.0
    run_tokens: int = 0
    queue_tokens: int = 0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RecordError(f"role: must be one of {', '.join(ROLES)}, is {self.role[:40]!r}")
        if self.endpoint:
            _check_endpoint(self.endpoint)
        # Printable only: these words end up in people's terminals.
        if len(self.software) > MAX_SOFTWARE_CHARS or not self.software.isprintable():
            raise RecordError(f"software: must be at most {MAX_SOFTWARE_CHARS} printable characters")
        _check_range("started_s", self.started_s, MAX_TIME_S)
        _check_range("n_blocks", self.n_blocks, MAX_UINT32)
        _check_range("tokens_per_s", self.tokens_per_s, MAX_TOKENS_PER_S)
        _check_range("run_tokens", self.run_tokens, limits.MAX_RUN_TOKENS)
        _check_range("queue_tokens", self.queue_tokens, MAX_UINT32)


def block_key(run_id: str, block: BlockId) -> str:
    """Key of a block's replicas: one sub-key per owner."""
    return f"{run_id}/{block.layer}/{block.block}"


def peers_key(run_id: str) -> str:
    """Key of a run's peers: one sub-key per peer."""
    return f"{run_id}/peers"


def manifest_key(run_id: str) -> str:
    """Key of a run's manifest: its one sub-key is the run's owner."""
    return f"{run_id}/manifest"


def parse_key(key: str) -> RecordKey:
    """Take a key apart; raises RecordError for one that no builder above makes."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise RecordError(f"key: {key[:80]!r} is not RUN/LAYER/BLOCK, RUN/peers or RUN/manifest")
    if match["topic"] == "peers":
        return RecordKey(match["run"], "peers", None)
    if match["topic"] == "manifest":
        return RecordKey(match["run"], "manifest", None)
    block = BlockId(int(match["layer"]), int(match["block"]))
    _check_range("key: layer", block.layer, limits.MAX_LAYERS - 1)
    _check_range("key: block", block.block, limits.MAX_EXPERTS_PER_LAYER - 1)
    return RecordKey(match["run"], "block", block)


def max_ttl_s(key: str) -> float:
    """Longest life, in seconds, of a record under `key`."""
    return MAX_MANIFEST_TTL_S if parse_key(key).topic == "manifest" else MAX_ANNOUNCE_TTL_S


def sign_record(identity: Identity, *, key: str, version: int, expiration_s: float, payload: bytes) -> bytes:
    """Sign one record as its owner; its sub-key is the owner's peer id. An empty payload withdraws."""
    record = SignedRecord(
        key=key, owner=identity.peer_id, version=version, expiration_s=float(expiration_s), payload=payload
    )
    _check_envelope(record)
    _check_payload(record)
    signature = identity.sign(_DOMAIN, _signed_bytes(record))
    return _encode(record, identity.public_key, signature)


def open_record(raw: bytes, *, key: str, now_s: float) -> SignedRecord:
    """Check a record that came from a peer and was asked for under `key`.

    Raises:
        RecordError: it is oversize, malformed, forged, another key's, expired or signed too far into the future.
    """
    record = verify_record(raw)
    if record.key != key:
        raise RecordError(f"key: the record is signed for {record.key!r}, not for {key[:80]!r}")
    check_time(record, now_s)
    return record


def verify_record(raw: bytes) -> SignedRecord:
    """Everything that `open_record` checks but the expected key and the time: true once, true for ever."""
    if len(raw) > MAX_RECORD_BYTES:
        raise RecordError(f"record: is {len(raw)} bytes, but the limit is {MAX_RECORD_BYTES}")
    message = _parse(records_pb2.SignedRecord, raw)
    record = SignedRecord(
        key=message.key,
        owner=message.subkey,
        version=message.version,
        expiration_s=message.expiration_s,
        payload=message.payload,
    )
    if _encode(record, message.public_key, message.signature) != raw:
        raise RecordError("record: not in canonical encoding")
    _check_envelope(record)
    _check_signature(record, message.public_key, message.signature)
    _check_payload(record)
    return record


def check_time(record: SignedRecord, now_s: float) -> None:
    """Raise RecordError unless the record expires after `now_s` and no later than its kind may."""
    left_s = record.expiration_s - now_s
    if left_s <= 0:
        raise RecordError(f"expiration_s: expired {-left_s:.1f} s ago; check that this machine's clock is right")
    if left_s > max_ttl_s(record.key):
        raise RecordError(f"expiration_s: {left_s:.1f} s ahead, but the limit is {max_ttl_s(record.key)} s")


def read_payload(record: SignedRecord) -> BlockRecord | PeerRecord | None:
    """What a block's or peer's record says; None if it is withdrawn. Raises RecordError."""
    key = parse_key(record.key)
    if record.withdrawn:
        return None
    if key.topic == "peers":
        return decode_peer(record.payload)
    said = decode_block(record.payload)
    if said.block != key.block:
        raise RecordError(f"block: the payload is about {said.block}, its key about {key.block}")
    return said


def encode_block(record: BlockRecord) -> bytes:
    """Payload of a block's record."""
    return records_pb2.BlockRecord(
        layer=record.block.layer,
        block=record.block.block,
        version=record.version,
        endpoint=record.endpoint,
        queue_tokens=record.queue_tokens,
        tokens_per_s=record.tokens_per_s,
        tokens_total=record.tokens_total,
        n_experts=record.n_experts,
    ).SerializeToString(deterministic=True)


def decode_block(payload: bytes) -> BlockRecord:
    """Raises RecordError naming the first field that is wrong."""
    _check_length(payload, MAX_ANNOUNCE_PAYLOAD_BYTES)
    message = _parse(records_pb2.BlockRecord, payload)
    return BlockRecord(
        block=BlockId(message.layer, message.block),
        version=message.version,
        endpoint=message.endpoint,
        queue_tokens=message.queue_tokens,
        tokens_per_s=message.tokens_per_s,
        tokens_total=message.tokens_total,
        n_experts=message.n_experts,
    )


def encode_peer(record: PeerRecord) -> bytes:
    """Payload of a peer's record."""
    return records_pb2.PeerRecord(
        role=record.role,
        endpoint=record.endpoint,
        software=record.software,
        started_s=record.started_s,
        n_blocks=record.n_blocks,
        tokens_per_s=record.tokens_per_s,
        run_tokens=record.run_tokens,
        queue_tokens=record.queue_tokens,
    ).SerializeToString(deterministic=True)


def decode_peer(payload: bytes) -> PeerRecord:
    """Raises RecordError naming the first field that is wrong."""
    _check_length(payload, MAX_ANNOUNCE_PAYLOAD_BYTES)
    message = _parse(records_pb2.PeerRecord, payload)
    return PeerRecord(
        role=message.role,  # type: ignore[arg-type]  # checked by PeerRecord itself
        endpoint=message.endpoint,
        software=message.software,
        started_s=message.started_s,
        n_blocks=message.n_blocks,
        tokens_per_s=message.tokens_per_s,
        run_tokens=message.run_tokens,
        queue_tokens=message.queue_tokens,
    )


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
    toml = _parse(records_pb2.ManifestRecord, record.payload).toml
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
    _check_range("record version", record.version, MAX_RECORD_VERSION)
    _check_range("expiration_s", record.expiration_s, MAX_TIME_S)
    limit = MAX_MANIFEST_PAYLOAD_BYTES if key.topic == "manifest" else MAX_ANNOUNCE_PAYLOAD_BYTES
    _check_length(record.payload, limit)


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
    fields = (
        record.key.encode(),
        record.owner.encode(),
        struct.pack(">Qd", record.version, record.expiration_s),
        record.payload,
    )
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
    ).SerializeToString(deterministic=True)


def _parse(kind: type[M], raw: bytes) -> M:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise RecordError(f"{kind.DESCRIPTOR.name}: cannot be parsed") from None


def _check_length(payload: bytes, limit: int) -> None:
    if len(payload) > limit:
        raise RecordError(f"payload: is {len(payload)} bytes, but the limit is {limit}")


def _check_range(field: str, value: float, high: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= high:
        raise RecordError(f"{field}: must be from 0 to {high}, is {value}")


def _check_endpoint(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    well_formed = len(endpoint) <= MAX_ENDPOINT_CHARS and _HOST_NAME.fullmatch(host) and _PORT.fullmatch(port)
    if not well_formed or int(port) > _MAX_PORT:
        raise RecordError(f"endpoint: must be host:port such as 192.0.2.1:4000, is {endpoint[:80]!r}")
