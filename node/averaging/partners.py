"""Which replica holder to exchange with next: pure choice, weighted by how stale and how near each one is.

What is weighed is this node's own memory of exchanges, and versions that partners announce; the latter count little, as
anyone can announce anything. A block of a partner that can have nothing new is not due, and a partner without a block
that is due is no candidate.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from common.backoff import backoff_s

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping, Sequence

    from dht.view import Replica
    from node.averaging.exchange import BlockResult
    from protocol.manifest import BlockId

FRESH_S = 1.0
"""Who was met just now weighs as if that were so long ago: no candidate's weight is zero.

While another partner is busy, a partner met that lately is not met again: better wait than hear the same again."""

SETTLED = 1e-4
"""Relative distance that is no news: nobody must be told of it."""

LEFT_OUT = 0.01
"""The part of a difference that the coarsest codec may leave between a pair that has just met."""

QUIET_S = 60.0
"""A pair that has nothing new by all that is known here meets that often all the same: a partner may have moved without
a step, and wait to be dialled."""

WORTH_IT = 0.005
"""Relative distance that a pair lets build up between two meetings of a block."""

_KEPT_DRIFT = 0.8
"""A meeting at which little had happened says nothing of the next: what was measured before is forgotten slowly."""

_NEW_SHARE_WEIGHT = 0.2
"""One meeting may fall between two steps of one side: a partner's share of the work is a moving average."""

MOST_GROWTH = 2
"""What so many steps did to a pair says something of up to so many times as many: learning rates rise from nothing."""

LASTING_STEPS = 64
"""A partner with whom a replica has not met for so many steps no longer counts as one that learns with it."""

LONGEST_REST_S = 10.0
"""A pair whose replicas learn meets at least this often, whatever the last meeting found."""

NEAR_S = 0.05
"""Nearer than this is near enough."""

MAX_GAP_STEPS = 1023
"""A larger gap weighs no more, eleven times one of nothing: versions are whatever a partner announces."""

FIRST_AVOID_S = 4.0
FIRST_BUSY_S = 0.2
MAX_BUSY_DOUBLINGS = 4
MAX_AVOID_S = 120.0
MAX_PAIRS = 1 << 16
"""(block, partner) pairs that are remembered; dialling in under many names must not fill the memory."""

MAX_PARTNERS = 1 << 12
_NEW_LATENCY_WEIGHT = 0.3

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A peer that holds some of this node's blocks that are due, the one not exchanged with it for longest first.

    `seconds_since` is that block's time, `version_gap` the largest difference in optimizer steps of one block,
    `latency_s` how long an exchange of one block took of late (0: never measured, so worth a try).
    """

    peer_id: str
    endpoint: str
    blocks: tuple[BlockId, ...]
    seconds_since: float
    version_gap: int
    latency_s: float


@dataclass(frozen=True)
class _Partner:
    latency_s: float = 0.0
    failures: int = 0
    avoided_until_s: float = -math.inf
    busy: int = 0
    """Times in a row that it was; 0 if it failed instead."""
    unreachable: bool = False


@dataclass(frozen=True)
class _Meeting:
    at_s: float
    version: int = -1
    """Both replicas' once they had moved; any version is newer where they did not."""
    moved: float = -math.inf
    """How far exchanges had moved the block here in all, but for what this one may have left out."""
    drift: float = math.inf
    """Relative distance by which an optimizer step moves the replicas apart: the most of late."""
    steps: int = 0
    """Over how many steps that was measured, of late."""
    share: float = 0.0
    """The partner's part of what both learn."""

    def next(self, at_s: float, result: BlockResult) -> _Meeting:
        """The meeting after this one."""
        moved = result.moved - LEFT_OUT * min(result.divergence, 1.0)
        if self.version < 0:
            return _Meeting(at_s, result.version, moved, share=result.partner_share)
        steps = max(0, result.version - self.version)
        drift = result.divergence / max(1, steps)
        drift = max(drift, _KEPT_DRIFT * self.drift) if math.isfinite(self.drift) else drift
        steps = max(steps, int(_KEPT_DRIFT * self.steps))
        share = self.share + _NEW_SHARE_WEIGHT * (result.partner_share - self.share)
        return _Meeting(at_s, result.version, moved, drift, steps, share)

    def rests(self, since_s: float, steps: int, moved: float, rest_s: float) -> bool:
        """Whether too little can have built up, by steps and by what others brought, or the pair met too lately."""
        little = self.drift * max(1, steps) + moved < WORTH_IT and steps <= MOST_GROWTH * self.steps
        return since_s < rest_s or (little and since_s < LONGEST_REST_S)


class History:
    """When each block met each partner, how long that took, who failed. Bounded: the least recent is forgotten.

    Times in seconds of the caller's clock; whom nobody met counts from `begun_s`.
    """

    def __init__(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._met: OrderedDict[tuple[BlockId, str], _Meeting] = OrderedDict()
        self._moved: defaultdict[BlockId, float] = defaultdict(float)
        self._partners: OrderedDict[str, _Partner] = OrderedDict()

    def met(self, block_id: BlockId, peer_id: str, now_s: float, result: BlockResult | None = None) -> None:
        """A block was exchanged with a partner, or, without a `result`, the partner would not."""
        meeting = _Meeting(now_s)
        if result is not None:
            self._moved[block_id] = max(self._moved[block_id], result.moved)
            before = self._met.get((block_id, peer_id), meeting)
            meeting = before.next(now_s, result)
        _put(self._met, (block_id, peer_id), meeting, MAX_PAIRS)

    def answered(self, peer_id: str, seconds_per_block: float) -> None:
        """A partner that was dialled answered: its failures are forgiven, its latency is a moving average."""
        before = self._partners.get(peer_id, _Partner()).latency_s
        latency_s = before + _NEW_LATENCY_WEIGHT * (seconds_per_block - before) if before else seconds_per_block
        _put(self._partners, peer_id, _Partner(latency_s=latency_s), MAX_PARTNERS)

    def failed(self, peer_id: str, now_s: float, *, unreachable: bool = False) -> None:
        """Avoid a partner that was dialled in vain, each time in a row for twice as long, up to MAX_AVOID_S."""
        partner = self._partners.get(peer_id, _Partner())
        avoid_s = backoff_s(FIRST_AVOID_S, partner.failures, max_s=MAX_AVOID_S)
        failed = _Partner(partner.latency_s, partner.failures + 1, now_s + avoid_s, unreachable=unreachable)
        _put(self._partners, peer_id, failed, MAX_PARTNERS)

    def busy(self, peer_id: str, now_s: float, retry_after_s: float) -> None:
        """Avoid a partner for as long as it asks, each time in a row for twice as long; that is no failure."""
        partner = self._partners.get(peer_id, _Partner())
        asked_s = max(retry_after_s, FIRST_BUSY_S)
        avoid_s = backoff_s(asked_s, partner.busy, max_doublings=MAX_BUSY_DOUBLINGS, max_s=MAX_AVOID_S)
        busy = _Partner(partner.latency_s, partner.failures, now_s + avoid_s, partner.busy + 1)
        _put(self._partners, peer_id, busy, MAX_PARTNERS)

    def unreachable(self) -> frozenset[str]:
        """Partners that could not be reached when they were dialled last: dead, perhaps, though still announced."""
        return frozenset(peer_id for peer_id, partner in self._partners.items() if partner.unreachable)

    def avoids(self, peer_id: str, now_s: float) -> bool:
        """Whether a partner is not to be dialled yet."""
        return peer_id in self._partners and self._partners[peer_id].avoided_until_s > now_s

    def is_busy(self, peer_id: str, now_s: float) -> bool:
        """Whether a partner is only avoided because it is busy."""
        return self.avoids(peer_id, now_s) and self._partners[peer_id].busy > 0

    def busy_for_s(self, now_s: float) -> float:
        """Return the seconds until the first busy partner may be dialled again; infinite if none is busy."""
        waits_s = (p.avoided_until_s - now_s for p in self._partners.values() if p.busy and p.avoided_until_s > now_s)
        return min(waits_s, default=math.inf)

    def is_due(
        self, replica: Replica, own_version: int, now_s: float, *, rest_s: float = 0.0, others_busy: bool = False
    ) -> bool:
        """Whether an exchange of a block with the holder of `replica` may bring anything new to either side.

        With a `rest_s`, it must be enough to be worth its bytes, and that long ago.
        """
        meeting = self._met.get((replica.block, replica.peer_id))
        if meeting is None:
            return True
        since_s = now_s - meeting.at_s
        if others_busy and since_s < FRESH_S:
            return False
        version, moved = max(own_version, replica.version), self._moved[replica.block] - meeting.moved
        if rest_s and meeting.rests(since_s, version - meeting.version, moved, rest_s):
            return False
        return version > meeting.version or moved >= SETTLED or since_s >= QUIET_S

    def shares(self, block_id: BlockId, own_version: int) -> tuple[float, ...]:
        """What part each partner does of what it and this replica learn, 0 to 1; of those it has met lately."""
        oldest = max(0, own_version - LASTING_STEPS)
        met = (meeting for (met_id, _), meeting in self._met.items() if met_id == block_id)
        return tuple(meeting.share for meeting in met if meeting.version >= oldest)

    def seconds_since(self, block_id: BlockId, peer_id: str, now_s: float) -> float:
        """Since a block met a partner."""
        meeting = self._met.get((block_id, peer_id))
        return max(0.0, now_s - (meeting.at_s if meeting else self._begun_s))

    def latency_s(self, peer_id: str) -> float:
        """Return the latency of one block's exchange with a partner; 0 if never measured."""
        return self._partners.get(peer_id, _Partner()).latency_s


def candidates(
    versions: Mapping[BlockId, int],
    replicas_of: Callable[[BlockId], Sequence[Replica]],
    own_peer_id: str,
    history: History,
    now_s: float,
    rest_s: float = 0.0,
) -> tuple[Candidate, ...]:
    """Peers other than this one that serve blocks of `versions` (this node's own), ordered by peer id.

    Left out are partners that `history` avoids, and those with whom no block is due (see `History.is_due`).
    """

    def is_due(replica: Replica) -> bool:
        return history.is_due(replica, versions[replica.block], now_s, rest_s=rest_s, others_busy=others_busy)

    held: defaultdict[str, list[Replica]] = defaultdict(list)
    for block_id in versions:
        for replica in replicas_of(block_id):
            if replica.peer_id != own_peer_id and replica.state == "serving":
                held[replica.peer_id].append(replica)
    others_busy = any(history.is_busy(peer_id, now_s) for peer_id in held)
    due = {
        peer_id: [replica for replica in held[peer_id] if is_due(replica)]
        for peer_id in sorted(held)
        if not history.avoids(peer_id, now_s)
    }
    return tuple(_candidate(replicas, versions, history, now_s) for replicas in due.values() if replicas)


def choose_partner(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """One of at least one candidate, at random in proportion to `weight`: each has its turn some time."""
    return rng.choices(candidates, [weight(candidate) for candidate in candidates])[0]


def weight(candidate: Candidate) -> float:
    """Grows with the time since the last exchange and with the gap in versions, shrinks with latency; never zero."""
    gap = 1 + math.log2(1 + min(candidate.version_gap, MAX_GAP_STEPS))
    return (FRESH_S + candidate.seconds_since) * gap / (NEAR_S + candidate.latency_s)


def _candidate(
    replicas: Sequence[Replica], versions: Mapping[BlockId, int], history: History, now_s: float
) -> Candidate:
    newest = max(replicas, key=lambda replica: replica.expiration_s)  # a peer may have moved between two records
    since_s = {replica.block: history.seconds_since(replica.block, newest.peer_id, now_s) for replica in replicas}
    return Candidate(
        peer_id=newest.peer_id,
        endpoint=newest.endpoint,
        blocks=tuple(sorted(since_s, key=lambda block_id: (-since_s[block_id], block_id))),
        seconds_since=max(since_s.values()),
        version_gap=max(abs(replica.version - versions[replica.block]) for replica in replicas),
        latency_s=history.latency_s(newest.peer_id),
    )


def _put(table: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)
