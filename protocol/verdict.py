"""What an evaluator signs of an offered expert: this file, in the present expert's place, gains. Hosts act on it.

A verdict says everything that a host must compare before it believes it: run, place, file, the version of the block
that the file was held against, and when. Who may sign is the run's owner's to say (`PeerRecord.evaluators`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from common.errors import IdentityError, InvalidInputError, LimitExceededError, RecordError
from protocol import contribution_pb2 as pb
from protocol import limits
from protocol.announcements import MAX_RECORD_VERSION, MAX_TIME_S, parse_record
from protocol.call_signature import MAX_AGE_S
from protocol.identity import Identity, peer_id_of, verify
from protocol.version import PROTOCOL_VERSION

MAX_VERDICT_BYTES = 512
SHA256_BYTES = hashlib.sha256().digest_size
VERDICT_TTL_S = 600.0
"""A verdict that is older is not acted on, by a clock that may be off by `call_signature.MAX_AGE_S`."""

MAX_NEEDED = 2
PROGRESS = 0.05
"""The share of its steps so far that a block may take while it still counts as what an offer was compared with. Losses
fall with a small power of the steps, so by them the whole layer gains less than makes one expert worth taking in."""

_DOMAIN = b"verdict/1"


@dataclass(frozen=True, kw_only=True)
class Offered:
    """Which file is offered for which place: expert `expert` of layer `layer` of a run."""

    run_id: str
    layer: int
    expert: int
    sha256: bytes

    def __post_init__(self) -> None:
        if len(self.sha256) != SHA256_BYTES:
            raise InvalidInputError("sha256", f"has {len(self.sha256)} bytes, must have {SHA256_BYTES}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A gain of `low` to `high` nats per token over `n_windows`; `version` of the block it was held against."""

    offered: Offered
    version: int
    n_windows: int
    low: float
    high: float
    issued_s: float


def needed_verdicts(n_evaluators: int) -> int:
    """Two where there are two: one evaluator that lies is then not enough."""
    return min(MAX_NEEDED, n_evaluators)


def steps_between(max_staleness: int, version: int) -> int | None:
    """Most steps that a block at `version` may be away from the version in a verdict; None: any number.

    `max_staleness` is the run's, for gradients, and 0 means no limit; a block that has taken many steps may take more.
    """
    return max_staleness + int(PROGRESS * version) if max_staleness else None


def sign_verdict(identity: Identity, verdict: Verdict) -> pb.SignedVerdict:
    """The verdict and its signature."""
    offered = verdict.offered
    raw = pb.Verdict(
        protocol_version=PROTOCOL_VERSION,
        run_id=offered.run_id,
        layer=offered.layer,
        expert=offered.expert,
        sha256=offered.sha256,
        version=verdict.version,
        n_windows=verdict.n_windows,
        low=verdict.low,
        high=verdict.high,
        issued_s=verdict.issued_s,
    ).SerializeToString(deterministic=True)
    return pb.SignedVerdict(verdict=raw, public_key=identity.public_key, signature=identity.sign(_DOMAIN, raw))


def open_verdict(message: pb.SignedVerdict) -> tuple[str, Verdict]:
    """Who signed it, and what it says; InvalidInputError unless the signature holds and every field can be."""
    raw = message.verdict
    if len(raw) > MAX_VERDICT_BYTES:
        raise LimitExceededError("verdict bytes", len(raw), MAX_VERDICT_BYTES)
    try:
        verify(message.public_key, _DOMAIN, raw, message.signature)
        return peer_id_of(message.public_key), _read(parse_record(pb.Verdict, raw))
    except (IdentityError, RecordError) as error:
        raise InvalidInputError("verdict", str(error)) from None


def check_verdict(verdict: Verdict, offered: Offered, now_s: float, since_s: float) -> None:
    """Raise InvalidInputError unless it is about this file in this place, and was signed lately, after `since_s`."""
    if verdict.offered != offered:
        raise InvalidInputError("verdict", "is about another file, place or run")
    age_s = now_s - verdict.issued_s
    if not -MAX_AGE_S <= age_s <= VERDICT_TTL_S:
        limit = f"{VERDICT_TTL_S:.0f} s ago or {MAX_AGE_S:.0f} s ahead is the most"
        raise InvalidInputError("verdict.issued_s", f"is {age_s:.0f} s ago, {limit}")
    if verdict.issued_s <= since_s:
        raise InvalidInputError("verdict.issued_s", "is before this host began, which may have acted on it already")


def _read(message: pb.Verdict) -> Verdict:
    if message.protocol_version != PROTOCOL_VERSION:
        raise InvalidInputError("verdict.protocol_version", f"is {message.protocol_version}, not {PROTOCOL_VERSION}")
    if not 0 <= message.issued_s <= MAX_TIME_S:
        raise InvalidInputError("verdict.issued_s", f"is {message.issued_s}, no time since 1970")
    if message.version > MAX_RECORD_VERSION:
        raise LimitExceededError("verdict.version", message.version, MAX_RECORD_VERSION)
    if math.isnan(message.low) or math.isnan(message.high):
        raise InvalidInputError("verdict.low, verdict.high", "are no numbers")
    if len(message.run_id) > limits.MAX_RUN_ID_CHARS:
        raise LimitExceededError("verdict.run_id characters", len(message.run_id), limits.MAX_RUN_ID_CHARS)
    return Verdict(
        offered=Offered(run_id=message.run_id, layer=message.layer, expert=message.expert, sha256=message.sha256),
        version=message.version,
        n_windows=message.n_windows,
        low=message.low,
        high=message.high,
        issued_s=message.issued_s,
    )
