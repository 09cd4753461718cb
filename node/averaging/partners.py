"""Which replica holder to exchange with next: pure choice, weighted by how stale and how near each one is.

What is weighed is this node's own memory of exchanges, and versions that partners announce; the latter count little, as
anyone can announce anything.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping, Sequence

    from dht.view import Replica
    from protocol.manifest import BlockId

FRESH_S = 1.0
"""Who was met just now weighs as if that were so long ago: nobody's weight is zero."""

NEAR_S = 0.05
"""Nearer than this is near enough."""

MAX_GAP_STEPS = 1023
"""A larger gap weighs no more, eleven times one of nothing: versions are whatever a partner announces."""

FIRST_AVOID_S = 4.0
MAX_AVOID_S = 120.0
MAX_PAIRS = 1 << 16
"""(block, partner) pairs that are remembered; dialling in under many names must not fill the memory."""

MAX_PARTNERS = 1 << 12
_NEW_LATENCY_WEIGHT = 0.3

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A peer that holds some of this node's blocks, the one not exchanged with it for longest first.

    `seconds_since` is that block's time, `version_gap` the largest difference in optimizer steps of one block,
    `latency_s` how long an exchange of one block took of late (0: never measured, so worth a try).
    """

    peer_id: str
    endpoint: str
    blocks: tuple[BlockId, ...]
    seconds_since: float
    version_gap: int
    latency_s: float


@dataclass
class _Partner:
    latency_s: float = 0.0
    failures: int = 0
    avoided_until_s: float = -math.inf


class History:
    """When each block met each partner, how long that took, who failed. Bounded: the least recent is forgotten.

    Times in seconds of the caller's clock; whom nobody met counts from `begun_s`.
    """

    def __init__(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._met_s: OrderedDict[tuple[BlockId, str], float] = OrderedDict()
        self._partners: OrderedDict[str, _Partner] = OrderedDict()

    def met(self, block_id: BlockId, peer_id: str, now_s: float) -> None:
        """A block was exchanged with a partner, or the partner would not."""
        _put(self._met_s, (block_id, peer_id), now_s, MAX_PAIRS)

    def answered(self, peer_id: str, seconds_per_block: float) -> None:
        """A partner that was dialled answered: its failures are forgiven, its latency is a moving average."""
        before = self._partners.get(peer_id, _Partner()).latency_s
        latency_s = before + _NEW_LATENCY_WEIGHT * (seconds_per_block - before) if before else seconds_per_block
        _put(self._partners, peer_id, _Partner(latency_s=latency_s), MAX_PARTNERS)

    def failed(self, peer_id: str, now_s: float) -> None:
        """Avoid a partner that was dialled in vain, each time in a row for twice as long, up to MAX_AVOID_S."""
        partner = self._partners.get(peer_id, _Partner())
        avoid_s = min(MAX_AVOID_S, FIRST_AVOID_S * 2.0 ** min(partner.failures, 32))
        failed = _Partner(partner.latency_s, partner.failures + 1, now_s + avoid_s)
        _put(self._partners, peer_id, failed, MAX_PARTNERS)

    def busy(self, peer_id: str, now_s: float, retry_after_s: float) -> None:
        """Avoid a partner that asks for it; that is no failure."""
        partner = self._partners.get(peer_id, _Partner())
        until_s = now_s + min(max(retry_after_s, 0.0), MAX_AVOID_S)
        _put(self._partners, peer_id, _Partner(partner.latency_s, partner.failures, until_s), MAX_PARTNERS)

    def avoids(self, peer_id: str, now_s: float) -> bool:
        """Whether a partner is not to be dialled yet."""
        return peer_id in self._partners and self._partners[peer_id].avoided_until_s > now_s

    def seconds_since(self, block_id: BlockId, peer_id: str, now_s: float) -> float:
        """Since a block met a partner."""
        return max(0.0, now_s - self._met_s.get((block_id, peer_id), self._begun_s))

    def latency_s(self, peer_id: str) -> float:
        """Of one block's exchange with a partner; 0 if never measured."""
        return self._partners.get(peer_id, _Partner()).latency_s


def candidates(
    versions: Mapping[BlockId, int],
    replicas_of: Callable[[BlockId], Sequence[Replica]],
    own_peer_id: str,
    history: History,
    now_s: float,
) -> tuple[Candidate, ...]:
    """Peers other than this one that serve blocks of `versions` (this node's own), ordered by peer id.

    Partners that `history` avoids are left out.
    """
    held: defaultdict[str, list[Replica]] = defaultdict(list)
    for block_id in versions:
        for replica in replicas_of(block_id):
            if replica.peer_id != own_peer_id and replica.state == "serving":
                held[replica.peer_id].append(replica)
    return tuple(
        _candidate(held[peer_id], versions, history, now_s)
        for peer_id in sorted(held)
        if not history.avoids(peer_id, now_s)
    )


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
