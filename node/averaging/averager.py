"""Begins exchanges: every so often one partner is dialled, beside training, and the result is counted and reported.

Belongs to the event loop. A partner that fails is left alone by averaging for a while; the directory is not told, as a
host that cannot average may still answer tokens.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import KilohiveError, OverloadedError, UnavailableError
from node.averaging.events import ExchangeEvent
from node.averaging.exchange import ExchangeResult
from node.averaging.pairing import SLOW_HERE
from node.averaging.partners import FIRST_BUSY_S, History, candidates, choose_partner
from protocol.endpoints import Address
from protocol.limits import MAX_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from common.events import EventLog
    from dht.view import Replica
    from node.averaging.partners import Candidate
    from node.averaging.replica import AveragedReplica
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

JITTER = 0.25
BUSY_JITTER = 1.0
STOP_TIMEOUT_S = 2.0
MAX_SHARE = 0.999
"""Who claims more of the work than that counts as this: nobody's work is infinitely more than another's."""


class OwnReplicas(Protocol):
    """What is averaged here."""

    def ids(self) -> tuple[BlockId, ...]:
        """Blocks held by this node."""

    def get(self, block_id: BlockId) -> AveragedReplica | None:
        """The replica of a block, if it is here."""


class Exchanger(Protocol):
    """Carries one exchange out."""

    async def exchange(self, partner: Address, block_ids: Sequence[BlockId], timeout_s: float) -> ExchangeResult:
        """Over these blocks, in this order, within `timeout_s`. Raises KilohiveError."""


class Holders(Protocol):
    """Who else holds a block."""

    def replicas(self, block: BlockId) -> Sequence[Replica]:
        """Live replicas of a block, read from memory."""


@dataclass(frozen=True, kw_only=True)
class AveragerConfig:
    """When this node begins exchanges. `timeout_s` is for one exchange over all blocks that a pair shares."""

    peer_id: str
    period_s: float
    timeout_s: float = 60.0
    seed: int = 0


class Averager:
    """Exchanges with one partner at a time, about every `period_s` seconds between `start` and `stop`.

    `on_result` also takes what the service answered, so that numbers and events cover both directions.
    """

    def __init__(
        self,
        replicas: OwnReplicas,
        client: Exchanger,
        directory: Holders,
        config: AveragerConfig,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas, self._client, self._directory = replicas, client, directory
        self._config, self._events, self._clock = config, events, clock
        # Nodes of one seed must not choose in step: each draws for itself.
        self._rng = random.Random(f"{config.seed}/{config.peer_id}")
        self._history = History(clock())
        self._divergence: dict[BlockId, float] = {}
        self._slow: set[BlockId] = set()
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.exchanged_bytes = 0

    def start(self) -> None:
        """Begin, with the first exchange about one period from now."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="averager")

    async def stop(self) -> None:
        """End it, in the middle of an exchange if need be, within STOP_TIMEOUT_S. Safe to call twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        _, late = await asyncio.wait({task}, timeout=STOP_TIMEOUT_S)
        if late:
            logger.error("An exchange of replicas does not end after %.0f s; leaving it", STOP_TIMEOUT_S)

    async def exchange_once(
        self, block_ids: Collection[BlockId] | None = None, *, rest_s: float = 0.0
    ) -> ExchangeResult | None:
        """One exchange now (after the one under way), of all blocks or only some; None if nobody has news of them.

        With a `rest_s`, of those only that have not met for so long and have drifted apart enough to be worth it.
        A failed exchange is a result with a problem, never an error.
        """
        async with self._one_at_a_time:
            partner = self._choose(block_ids, rest_s)
            return None if partner is None else await self._exchange_with(partner)

    def divergence(self, block_id: BlockId) -> float:
        """Relative distance to the partner at the block's last exchange; 0 before the first."""
        return self._divergence.get(block_id, 0.0)

    def works(self, block_id: BlockId, own_version: int) -> tuple[float, ...]:
        """Return the work of this replica, which is 1, and of each late partner relative to it."""
        shares = (min(share, MAX_SHARE) for share in self._history.shares(block_id, own_version))
        return (1.0, *(share / (1 - share) for share in shares))

    def unreachable(self) -> frozenset[str]:
        """Peers that could not be reached when they were dialled last."""
        return self._history.unreachable()

    def on_result(self, result: ExchangeResult) -> None:
        """Count and report an exchange, whichever side began it."""
        now_s = self._clock()
        self.exchanged_bytes += result.n_bytes
        moved = {block.block: block.divergence for block in result.blocks}
        held = set(self._replicas.ids())
        merged = {**self._divergence, **moved}
        self._divergence = {block_id: distance for block_id, distance in merged.items() if block_id in held}
        for block in result.blocks:
            self._history.met(block.block, result.partner, now_s, block)
        # Refused blocks too, where this node asked: a partner that always refuses must not always be asked next.
        for block_id in result.refused if result.dialled else ():
            if block_id not in result.busy:
                self._history.met(block_id, result.partner, now_s)
        self._leave_slow_ones(result)
        self._emit(result)

    def _leave_slow_ones(self, result: ExchangeResult) -> None:
        """Blocks that take longer than a call may last are not tried again: it would fail for ever."""
        for block_id in sorted(block_id for block_id, why in result.refused.items() if why == SLOW_HERE):
            if block_id not in self._slow:
                self._slow.add(block_id)
                logger.warning(
                    "Block %s is not averaged here: at the rate that --max-bandwidth-up and --max-bandwidth-down "
                    "allow, an exchange of it takes longer than the %.0f s that a call may last",
                    block_id,
                    MAX_DEADLINE_S,
                )

    def _choose(self, block_ids: Collection[BlockId] | None, rest_s: float) -> Candidate | None:
        wanted = self._replicas.ids() if block_ids is None else block_ids
        own = {
            block_id: replica.version
            for block_id in wanted
            if block_id not in self._slow and (replica := self._replicas.get(block_id))
        }
        now_s, peer_id = self._clock(), self._config.peer_id
        found = candidates(own, self._directory.replicas, peer_id, self._history, now_s, rest_s)
        return choose_partner(found, self._rng) if found else None

    async def _exchange_with(self, partner: Candidate) -> ExchangeResult:
        begun_s = self._clock()
        try:
            result = await self._client.exchange(
                Address(partner.peer_id, partner.endpoint), partner.blocks, self._config.timeout_s
            )
        except KilohiveError as error:
            result = _failure(partner.peer_id, self._clock() - begun_s, error)
            if isinstance(error, OverloadedError):
                self._busy(partner.peer_id, error.retry_after_s)
            else:
                gone = isinstance(error, UnavailableError)
                self._history.failed(partner.peer_id, self._clock(), unreachable=gone)
        else:
            self._remember(partner.peer_id, result)
        self.on_result(result)
        return result

    def _remember(self, peer_id: str, result: ExchangeResult) -> None:
        if result.problem and not result.blocks:
            self._history.failed(peer_id, self._clock())
        elif result.busy and not result.blocks:
            self._busy(peer_id, FIRST_BUSY_S)
        else:
            self._history.answered(peer_id, result.seconds / max(1, len(result.blocks)))

    def _busy(self, peer_id: str, retry_after_s: float) -> None:
        # Those who wait for the same partner are not to come back together.
        self._history.busy(peer_id, self._clock(), retry_after_s * self._rng.uniform(1, 1 + BUSY_JITTER))

    def _emit(self, result: ExchangeResult) -> None:
        distances = [block.divergence for block in result.blocks]
        self._events.emit(
            ExchangeEvent(
                partner=result.partner,
                dialled=result.dialled,
                blocks=len(result.blocks),
                divergence_max=max(distances, default=0.0),
                divergence_mean=sum(distances) / max(1, len(distances)),
                clipped=sum(block.clipped_rows for block in result.blocks),
                refused=len(result.refused),
                bytes=result.n_bytes,
                seconds=round(result.seconds, 3),
                problem=result.problem,
            )
        )

    async def _run(self) -> None:
        wait_s = pause_s(self._config.period_s, 0.0, self._rng)
        while True:
            await asyncio.sleep(wait_s)
            begun_s, result = self._clock(), None
            try:
                # Either side of a pair may begin: once in a period is enough for both.
                result = await self.exchange_once(rest_s=self._config.period_s * (1 - JITTER))
            except Exception:  # the task's boundary: a mistake in one exchange must not end averaging unseen
                logger.exception("An exchange of replicas failed")
            wait_s = self._wait_s(self._clock() - begun_s, result)

    def _wait_s(self, took_s: float, result: ExchangeResult | None) -> float:
        wait_s = pause_s(self._config.period_s, took_s, self._rng)
        if result is not None and result.blocks:
            return wait_s
        # Nothing has come of this turn: it is made up for as soon as a partner that was busy may be free.
        return min(wait_s, self._history.busy_for_s(self._clock()))


def pause_s(period_s: float, took_s: float, rng: random.Random) -> float:
    """Seconds to wait after an exchange that took `took_s`, so that the next begins a period after it began.

    The period is up to JITTER longer or shorter: nodes started together are not to dial each other together.
    """
    return max(0.0, period_s * rng.uniform(1 - JITTER, 1 + JITTER) - took_s)


def _failure(peer_id: str, seconds: float, error: KilohiveError) -> ExchangeResult:
    return ExchangeResult(
        partner=peer_id, dialled=True, blocks=(), refused={}, n_bytes=0, seconds=seconds, problem=str(error)
    )
