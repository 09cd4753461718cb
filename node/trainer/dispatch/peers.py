"""The peers as dispatch sees them: which replica to call, how it went, whom to leave alone for a while. Thread-safe."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from common.backoff import backoff_s
from common.errors import NotHostedError, OverloadedError, RefusedError
from dht.directory import MAX_AVOID_S
from node.trainer.dispatch.peer_costs import LatencyWindow, PeerCosts, choose
from protocol.call_errors import is_lost

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

    from common.errors import KilohiveError
    from dht.view import Replica
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

MAX_DOUBLINGS = 6
_REFUSED = "Peer %s at %s refuses what it was sent, which has passed the checks of this node: %s"
LOST_IN_A_ROW = 3
"""From this many losses without an answer between them on, the peer is at fault and not the network."""


class ReplicaSource(Protocol):
    """What dispatch needs of the directory: reads from memory, from any thread."""

    @property
    def generation(self) -> int:
        """Changes whenever the live replicas do."""

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        """Live replicas of a block, without those of avoided peers."""

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Return at the next change, or after `timeout_s`."""

    def report_failure(self, peer_id: str, retry_after_s: float) -> None:
        """Avoid a peer for a while."""

    def report_success(self, peer_id: str) -> None:
        """A peer answered."""


class Peers:
    """Chooses among the directory's replicas by what calls have cost, and tells the directory who failed.

    A peer that failed is avoided for `avoid_failed_s`, doubled by each further failure in a row; where calls only get
    lost, from the third in a row on, or a network that loses one in ten would empty the swarm. Calls that were on their
    way already when it came to be avoided are no further failures, or one death would count for each of them. One that
    says that it does not hold a block is only left alone for that block: it has given it up, and its record has yet to
    say so. One that refuses what it was sent is not held responsible: the mistake may be this node's.
    """

    def __init__(
        self,
        directory: ReplicaSource,
        avoid_failed_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._avoid_failed_s, self._random, self._clock = directory, avoid_failed_s, rng, clock
        self._lock = threading.Lock()
        self._costs = PeerCosts()
        self._latencies = LatencyWindow()
        self._failures_in_a_row: Counter[str] = Counter()
        self._avoided_until: dict[str, float] = {}
        self._given_up: dict[tuple[str, BlockId], float] = {}
        self.calls_ok = 0
        self.calls_failed = 0
        self.hedges_sent = 0
        self.hedges_won = 0

    def replicas(self, block: BlockId) -> list[Replica]:
        """Live replicas of a block that may be called now."""
        now_s = self._clock()
        return [
            replica
            for replica in self._directory.replicas(block)
            if self._given_up.get((replica.peer_id, block), now_s) <= now_s
        ]

    def choose(self, replicas: Sequence[Replica], planned: Counter[str]) -> Replica:
        """One of a block's replicas (one or more); `planned` are the tokens that each peer is about to get anyway."""
        now_s = self._clock()
        with self._lock:
            return choose(replicas, lambda r: self._costs.cost(r, now_s, planned[r.peer_id]), self._random)

    @contextmanager
    def in_flight(self, peer_id: str, n_tokens: int) -> Iterator[None]:
        """While a call of `n_tokens` is on its way."""
        with self._lock:
            self._costs.started(peer_id, n_tokens)
        try:
            yield
        finally:
            with self._lock:
                self._costs.ended(peer_id, n_tokens)

    def answered(self, peer_id: str) -> None:
        """A peer gave a good answer."""
        with self._lock:
            self.calls_ok += 1
            self._failures_in_a_row.pop(peer_id, None)
            self._avoided_until.pop(peer_id, None)
        self._directory.report_success(peer_id)

    def learn(self, peer_id: str, seconds: float, n_tokens: int, queue_tokens: int) -> None:
        """What a forward has cost."""
        with self._lock:
            self._latencies.add(seconds)
            self._costs.answered(peer_id, seconds, n_tokens, queue_tokens, self._clock())

    def hedged(self) -> None:
        """A late forward was sent elsewhere too."""
        with self._lock:
            self.hedges_sent += 1

    def outpaced(self, peer_id: str, seconds: float, n_tokens: int) -> None:
        """A late forward was given up after `seconds`: its hedge was complete first."""
        with self._lock:
            self.hedges_won += 1
            self._latencies.add(seconds)
            self._costs.outlasted(peer_id, seconds, n_tokens, self._clock())

    def late_after_s(self) -> float | None:
        """Return the seconds after which a forward is late; None while too few are known to say."""
        with self._lock:
            return self._latencies.late_after_s()

    def repeated(self, replica: Replica, error: KilohiveError) -> None:
        """A call got lost and is sent once more."""
        logger.info("A call to peer %s at %s got lost: %s", replica.peer_id, replica.endpoint, error)
        with self._lock:
            self.calls_failed += 1

    def failed(self, replica: Replica, blocks: Sequence[BlockId], error: KilohiveError) -> None:
        """A call for `blocks` failed."""
        if isinstance(error, RefusedError):
            logger.warning(_REFUSED, replica.peer_id, replica.endpoint, error)
        else:
            logger.info("Peer %s at %s failed: %s", replica.peer_id, replica.endpoint, error)
        with self._lock:
            self.calls_failed += 1
            if isinstance(error, RefusedError):
                return
            if isinstance(error, NotHostedError):
                self._give_up(replica.peer_id, blocks)
                return
            retry_after_s = self._avoid(replica.peer_id, error)
        if retry_after_s is not None:
            self._directory.report_failure(replica.peer_id, retry_after_s)

    def _avoid(self, peer_id: str, error: KilohiveError) -> float | None:
        """Called with the lock held. For how long a peer is avoided from now on; None: no longer than before."""
        now_s = self._clock()
        if self._avoided_until.get(peer_id, now_s) > now_s:
            return None
        self._failures_in_a_row[peer_id] += 1
        further = self._failures_in_a_row[peer_id] - (LOST_IN_A_ROW if is_lost(error) else 1)
        if further < 0:
            return None
        # A frozen peer costs a step its whole deadline at every try: tries become rare.
        retry_after_s = backoff_s(self._avoid_failed_s, further, max_doublings=MAX_DOUBLINGS)
        if isinstance(error, OverloadedError):
            retry_after_s = error.retry_after_s
        self._avoided_until[peer_id] = now_s + min(retry_after_s, MAX_AVOID_S)
        return retry_after_s

    def _give_up(self, peer_id: str, blocks: Sequence[BlockId]) -> None:
        """Called with the lock held. Of several blocks the error does not say which one is gone."""
        now_s = self._clock()
        given_up = {key: until_s for key, until_s in self._given_up.items() if until_s > now_s}
        if len(blocks) == 1:
            given_up[peer_id, blocks[0]] = now_s + self._avoid_failed_s
        self._given_up = given_up
