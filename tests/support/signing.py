"""Records as their owner signs them, and as an attacker would."""

from __future__ import annotations

from protocol import records_pb2
from protocol.announcements import BlockRecord, PeerRecord, encode_block
from protocol.identity import Identity
from protocol.manifest import BlockId
from protocol.records import _DOMAIN, SignedRecord, _signed_bytes, block_key, sign_record
from protocol.version import PROTOCOL_VERSION

NOW_S = 1_800_000_000.0
RUN = "demo-0123456789ab"
KEY = block_key(RUN, BlockId(1, 3))
OWNER = Identity(
    bytes([8, 1, 18, 64])
    + bytes(range(32))
    + bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
)
BLOCK = BlockRecord(
    block=BlockId(1, 3),
    version=7,
    endpoint="192.0.2.1:4000",
    queue_tokens=5,
    tokens_per_s=12.5,
    tokens_total=99,
    n_experts=32,
)
PEER = PeerRecord(
    role="host",
    endpoint="[2001:db8::1]:4000",
    software="kilohive 0.1.0",
    started_s=NOW_S - 60,
    n_blocks=8,
    tokens_per_s=1e4,
    run_tokens=123,
    queue_tokens=4,
)


def signed(**changes: object) -> bytes:
    fields = {"key": KEY, "version": 3, "expiration_s": NOW_S + 20.0, "payload": encode_block(BLOCK), **changes}
    return sign_record(OWNER, **fields)  # type: ignore[arg-type]


def forged(message: records_pb2.SignedRecord, signer: Identity = OWNER) -> bytes:
    """What an attacker gets who signs fields that `sign_record` would refuse."""
    record = SignedRecord(
        key=message.key,
        owner=message.subkey,
        version=message.version,
        expiration_s=message.expiration_s,
        payload=message.payload,
        ticket=message.ticket,
    )
    message.protocol_version = PROTOCOL_VERSION
    message.public_key, message.signature = signer.public_key, signer.sign(_DOMAIN, _signed_bytes(record))
    return message.SerializeToString(deterministic=True)


def unsigned(**changes: object) -> records_pb2.SignedRecord:
    message = records_pb2.SignedRecord.FromString(signed())
    for name, value in changes.items():
        setattr(message, name, value)
    return message
