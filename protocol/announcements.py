"""What peers say about themselves: payloads of block and peer records, checked field by field.

`records.py` signs them and proves whose they are; here every field gets its range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeVar, get_args

from common.errors import IdentityError, RecordError
from protocol import limits, records_pb2
from protocol.endpoints import check_endpoint, is_relay_address
from protocol.identity import public_key_of
from protocol.manifest import TRUNK, BlockId
from protocol.parsing import parse_or_raise

if TYPE_CHECKING:
    from google.protobuf.message import Message

MAX_ANNOUNCE_PAYLOAD_BYTES = 512
MAX_RECORD_VERSION = (1 << 63) - 1
MAX_SOFTWARE_CHARS = 64
MAX_TOKENS_PER_S = 1e15
MAX_TIME_S = 1e11
MAX_UINT32 = (1 << 32) - 1

Role = Literal["host", "trainer", "coordinator", "lighthouse"]
ROLES: Final = get_args(Role)
ReplicaState = Literal["serving", "joining", "stored"]
REPLICA_STATES: Final = get_args(ReplicaState)
"""The order is that of the numbers in the .proto file."""

Reachability = Literal["unknown", "reached", "not reached", "relayed"]
REACHABILITIES: Final = get_args(Reachability)
"""The order is that of the numbers in the .proto file."""

PauseCause = Literal["none", "owner", "condition", "device", "sleep"]
PAUSE_CAUSES: Final = get_args(PauseCause)
"""The order is that of the numbers in the .proto file."""

MAX_EVALUATORS = 4
MAX_DIVERGENCE = 1e9
MAX_STALENESS = 1e15

M = TypeVar("M", bound="Message")


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One replica of one block, or of `TRUNK`, as its owner describes it; `version` counts its optimizer steps.

    Queue and rates are the whole peer's: its blocks share one runtime. Only a `serving` replica is called; one that is
    `joining` is still downloaded, one that is `stored` is a checkpoint that can be downloaded. `divergence`: relative
    L2 distance to the partner of the last exchange, before it. The trunk has no experts.
    """

    block: BlockId
    version: int
    endpoint: str
    queue_tokens: int = 0
    tokens_per_s: float = 0.0
    tokens_total: int = 0
    n_experts: int = 0
    state: ReplicaState = "serving"
    divergence: float = 0.0

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)
        if self.state not in REPLICA_STATES:
            raise RecordError(f"state: must be one of {', '.join(REPLICA_STATES)}, is {self.state[:40]!r}")
        if self.block != TRUNK:
            check_range("layer", self.block.layer, limits.MAX_LAYERS - 1)
            check_range("block", self.block.block, limits.MAX_EXPERTS_PER_LAYER - 1)
        check_range("divergence", self.divergence, MAX_DIVERGENCE)
        check_range("version", self.version, MAX_RECORD_VERSION)
        check_range("queue_tokens", self.queue_tokens, MAX_UINT32)
        check_range("tokens_per_s", self.tokens_per_s, MAX_TOKENS_PER_S)
        check_range("tokens_total", self.tokens_total, limits.MAX_RUN_TOKENS)
        check_range("n_experts", self.n_experts, 0 if self.block == TRUNK else limits.MAX_EXPERTS_PER_LAYER)


@dataclass(frozen=True, kw_only=True)
class PeerRecord:
    """One peer of a run, as it describes itself; an empty endpoint means that nothing listens.

    `relay`: its multiaddress, for QUIC but for lighthouses, if it carries calls to others that cannot be dialled.
    `evaluators`: peer ids of trainers whose verdicts hosts are to act on; readers believe it of the run's owner alone.
    `paused_since_s` and `paused_until_s`, seconds since 1970, are 0 where there is no such moment, or nobody knows it.
    """

    role: Role
    endpoint: str = ""
    software: str = ""
    started_s: float = 0.0
    n_blocks: int = 0
    tokens_per_s: float = 0.0
    run_tokens: int = 0
    queue_tokens: int = 0
    own_tokens: int = 0
    staleness: float = 0.0
    exchanged_bytes: int = 0
    reachability: Reachability = "unknown"
    relay: str = ""
    paused: bool = False
    evaluators: tuple[str, ...] = ()
    pause_cause: PauseCause = "none"
    paused_since_s: float = 0.0
    paused_until_s: float = 0.0

    def __post_init__(self) -> None:
        if self.reachability not in REACHABILITIES:
            raise RecordError(
                f"reachability: must be one of {', '.join(REACHABILITIES)}, is {self.reachability[:40]!r}"
            )
        if self.role not in ROLES:
            raise RecordError(f"role: must be one of {', '.join(ROLES)}, is {self.role[:40]!r}")
        if self.pause_cause not in PAUSE_CAUSES:
            raise RecordError(f"pause_cause: must be one of {', '.join(PAUSE_CAUSES)}, is {self.pause_cause[:40]!r}")
        if self.endpoint:
            check_endpoint(self.endpoint)
        if self.relay and not is_relay_address(self.relay):
            forms = "/ip4/192.0.2.1/udp/4001/quic-v1 or /ip4/192.0.2.1/tcp/4001"
            raise RecordError(f"relay: must be like {forms}, is {self.relay[:80]!r}")
        # Printable only: these words end up in people's terminals.
        if len(self.software) > MAX_SOFTWARE_CHARS or not self.software.isprintable():
            raise RecordError(f"software: must be at most {MAX_SOFTWARE_CHARS} printable characters")
        check_range("started_s", self.started_s, MAX_TIME_S)
        check_range("n_blocks", self.n_blocks, MAX_UINT32)
        check_range("tokens_per_s", self.tokens_per_s, MAX_TOKENS_PER_S)
        check_range("run_tokens", self.run_tokens, limits.MAX_RUN_TOKENS)
        check_range("queue_tokens", self.queue_tokens, MAX_UINT32)
        check_range("own_tokens", self.own_tokens, limits.MAX_RUN_TOKENS)
        check_range("staleness", self.staleness, MAX_STALENESS)
        check_range("exchanged_bytes", self.exchanged_bytes, MAX_RECORD_VERSION)
        check_range("paused_since_s", self.paused_since_s, MAX_TIME_S)
        check_range("paused_until_s", self.paused_until_s, MAX_TIME_S)
        _check_evaluators(self.evaluators)


def encode_block(record: BlockRecord) -> bytes:
    """Payload of a block's record."""
    trunk = record.block == TRUNK
    return records_pb2.BlockRecord(
        layer=0 if trunk else record.block.layer,
        block=0 if trunk else record.block.block,
        trunk=trunk,
        state=REPLICA_STATES.index(record.state),  # type: ignore[arg-type]  # protobuf's stubs want its own enum
        divergence=record.divergence,
        version=record.version,
        endpoint=record.endpoint,
        queue_tokens=record.queue_tokens,
        tokens_per_s=record.tokens_per_s,
        tokens_total=record.tokens_total,
        n_experts=record.n_experts,
    ).SerializeToString(deterministic=True)


def decode_block(payload: bytes) -> BlockRecord:
    """Raises RecordError naming the first field that is wrong."""
    check_length(payload, MAX_ANNOUNCE_PAYLOAD_BYTES)
    message = parse_record(records_pb2.BlockRecord, payload)
    if message.trunk and (message.layer or message.block):
        raise RecordError(f"layer: the trunk has none, is {message.layer}/{message.block}")
    check_range("state", message.state, len(REPLICA_STATES) - 1)
    return BlockRecord(
        block=TRUNK if message.trunk else BlockId(message.layer, message.block),
        state=REPLICA_STATES[message.state],
        divergence=message.divergence,
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
        own_tokens=record.own_tokens,
        staleness=record.staleness,
        exchanged_bytes=record.exchanged_bytes,
        reachability=REACHABILITIES.index(record.reachability),  # type: ignore[arg-type]  # as above
        relay=record.relay,
        paused=record.paused,
        evaluators=record.evaluators,
        pause_cause=PAUSE_CAUSES.index(record.pause_cause),  # type: ignore[arg-type]  # as above
        paused_since_s=record.paused_since_s,
        paused_until_s=record.paused_until_s,
    ).SerializeToString(deterministic=True)


def decode_peer(payload: bytes) -> PeerRecord:
    """Raises RecordError naming the first field that is wrong."""
    check_length(payload, MAX_ANNOUNCE_PAYLOAD_BYTES)
    message = parse_record(records_pb2.PeerRecord, payload)
    check_range("reachability", message.reachability, len(REACHABILITIES) - 1)
    check_range("pause_cause", message.pause_cause, len(PAUSE_CAUSES) - 1)
    return PeerRecord(
        role=message.role,  # type: ignore[arg-type]  # checked by PeerRecord itself
        endpoint=message.endpoint,
        software=message.software,
        started_s=message.started_s,
        n_blocks=message.n_blocks,
        tokens_per_s=message.tokens_per_s,
        run_tokens=message.run_tokens,
        queue_tokens=message.queue_tokens,
        own_tokens=message.own_tokens,
        staleness=message.staleness,
        exchanged_bytes=message.exchanged_bytes,
        reachability=REACHABILITIES[message.reachability],
        relay=message.relay,
        paused=message.paused,
        evaluators=tuple(message.evaluators),
        pause_cause=PAUSE_CAUSES[message.pause_cause],
        paused_since_s=message.paused_since_s,
        paused_until_s=message.paused_until_s,
    )


def _check_evaluators(peer_ids: tuple[str, ...]) -> None:
    if len(peer_ids) > MAX_EVALUATORS or len(set(peer_ids)) < len(peer_ids):
        raise RecordError(f"evaluators: must be at most {MAX_EVALUATORS}, each named once, are {len(peer_ids)}")
    for peer_id in peer_ids:
        try:
            public_key_of(peer_id)
        except IdentityError as error:
            raise RecordError(f"evaluators: {error}") from None


def parse_record(kind: type[M], raw: bytes) -> M:
    """A message of `kind`; raises RecordError naming it."""
    return parse_or_raise(kind, raw, RecordError)


def check_length(payload: bytes, limit: int) -> None:
    """Raise RecordError for a payload over `limit` bytes."""
    if len(payload) > limit:
        raise RecordError(f"payload: is {len(payload)} bytes, but the limit is {limit}")


def check_range(field: str, value: float, high: float) -> None:
    """Raise RecordError unless `value` is finite and from 0 to `high`."""
    if not math.isfinite(value) or not 0 <= value <= high:
        raise RecordError(f"{field}: must be from 0 to {high}, is {value}")
