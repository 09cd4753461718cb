"""Which of a block's replicas is called: two drawn at random, the cheaper one taken. Clock and dice are passed in.

Power of two choices: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001. Always
taking the cheapest of all would send every trainer to the same replica, on stats that are old by the time they act.

A peer's cost is what a token costs there, times how busy it is:

    cost = rate * (1 + load / load_scale_tokens)        rate: EWMA of seconds / (tokens + fixed_tokens)

Requests differ in size, so seconds per call would say more about the request than about the peer, and seconds per
token would make every small call look slow: `fixed_tokens` stands for the round trip. Both replicas are compared for
the same pairs, so the size of the coming request does not matter.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from dht.view import Replica

MAX_KNOWN_PEERS = 4096
"""The peer that was heard of longest ago is forgotten first."""

UNKNOWN_RATE = 1e-6
"""Seconds per token where nobody is known yet; any number does, since it is compared with itself."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """How latency and load become a cost."""

    ewma_weight: float = 0.2
    fixed_tokens: int = 64
    load_scale_tokens: int = 1024
    """A peer with so many tokens waiting costs twice its rate."""
    half_life_s: float = 10.0
    """An estimate halves in this time: with two replicas the costlier one would otherwise never be tried again."""
    queue_fresh_s: float = 5.0
    """How long a queue that an answer reported is believed; after that the directory's is."""
    optimism: float = 0.5
    """A peer that nothing is known of is taken to be this much as slow as the fastest that is known."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a peer's answers have shown, and when (seconds of the caller's clock)."""

    rate: float
    at_s: float
    queue_tokens: int


class PeerCosts:
    """What every peer's answers have cost so far. Not thread-safe: its owner holds a lock."""

    def __init__(self, config: CostConfig | None = None) -> None:
        self._config = config or CostConfig()
        self._seen: dict[str, _Seen] = {}
        self._in_flight: Counter[str] = Counter()

    def started(self, peer_id: str, n_tokens: int) -> None:
        """`n_tokens` are on their way to a peer."""
        self._in_flight[peer_id] += n_tokens

    def ended(self, peer_id: str, n_tokens: int) -> None:
        """They no longer are, however it went."""
        self._in_flight[peer_id] -= n_tokens
        if self._in_flight[peer_id] <= 0:
            del self._in_flight[peer_id]

    def answered(self, peer_id: str, seconds: float, n_tokens: int, queue_tokens: int, now_s: float) -> None:
        """Learn from a forward of `n_tokens` that took `seconds` and left `queue_tokens` waiting at the peer."""
        rate = self._blend(peer_id, self._rate_of(seconds, n_tokens), now_s)
        self._keep(peer_id, _Seen(rate=rate, at_s=now_s, queue_tokens=queue_tokens))

    def outlasted(self, peer_id: str, seconds: float, n_tokens: int, now_s: float) -> None:
        """Learn from a forward that was given up after `seconds`: it would have taken longer."""
        rate, seen = self._rate_of(seconds, n_tokens), self._seen.get(peer_id)
        if seen is None or rate > self._aged(seen, now_s):
            queue_tokens = seen.queue_tokens if seen else 0
            self._keep(peer_id, _Seen(rate=self._blend(peer_id, rate, now_s), at_s=now_s, queue_tokens=queue_tokens))

    def cost(self, replica: Replica, now_s: float, planned_tokens: int = 0) -> float:
        """Seconds per token, weighted with the load; `planned_tokens` are about to be sent there."""
        config, peer_id = self._config, replica.peer_id
        load = self._in_flight[peer_id] + planned_tokens + self._queue_tokens(replica, now_s)
        return self._rate(peer_id, now_s) * (1 + load / config.load_scale_tokens)

    def _rate(self, peer_id: str, now_s: float) -> float:
        seen = self._seen.get(peer_id)
        if seen is not None:
            return self._aged(seen, now_s)
        fastest = min((self._aged(other, now_s) for other in self._seen.values()), default=UNKNOWN_RATE)
        return self._config.optimism * fastest

    def _queue_tokens(self, replica: Replica, now_s: float) -> int:
        seen = self._seen.get(replica.peer_id)
        if seen is not None and now_s - seen.at_s <= self._config.queue_fresh_s:
            return seen.queue_tokens
        return replica.queue_tokens

    def _rate_of(self, seconds: float, n_tokens: int) -> float:
        return seconds / (n_tokens + self._config.fixed_tokens)

    def _blend(self, peer_id: str, rate: float, now_s: float) -> float:
        seen = self._seen.get(peer_id)
        if seen is None:
            return rate
        weight = self._config.ewma_weight
        return (1 - weight) * self._aged(seen, now_s) + weight * rate

    def _aged(self, seen: _Seen, now_s: float) -> float:
        return seen.rate * math.exp2(-max(0.0, now_s - seen.at_s) / self._config.half_life_s)

    def _keep(self, peer_id: str, seen: _Seen) -> None:
        self._seen.pop(peer_id, None)  # last in the dictionary's order
        self._seen[peer_id] = seen
        if len(self._seen) > MAX_KNOWN_PEERS:
            del self._seen[next(iter(self._seen))]


def choose(replicas: Sequence[Replica], cost: Callable[[Replica], float], rng: random.Random) -> Replica:
    """The cheaper of two of `replicas` (one or more) drawn at random; the first drawn if they cost the same."""
    if len(replicas) == 1:
        return replicas[0]
    first, second = rng.sample(replicas, 2)
    return second if cost(second) < cost(first) else first


WINDOW = 200
MIN_SAMPLES = 20
QUANTILE = 0.95


class LatencyWindow:
    """The latest forwards' latencies in seconds. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """One more forward; one that was given up counts with the time that it was waited for.

        Without those the slowest would never be seen, and the percentile would sink until every call counted as late.
        """
        self._seconds.append(seconds)

    def late_after_s(self) -> float | None:
        """The 95th percentile, by nearest rank; None before MIN_SAMPLES."""
        if len(self._seconds) < MIN_SAMPLES:
            return None
        return sorted(self._seconds)[math.ceil(QUANTILE * len(self._seconds)) - 1]
