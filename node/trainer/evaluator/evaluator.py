"""A trainer as evaluator: between two of its steps it tries the offer that waits longest, a tenth of its time at most.

In one go: the present expert is trained on meanwhile by the run's other trainers, and by this one after every step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

from common.errors import DrainingError
from common.tasks import until_stopped
from node.model.expert_file import ExpertId
from node.rpc.handlers import failure_of
from node.trainer.evaluator.held_out_trial import refusal
from node.trainer.events import OfferEvent
from protocol import contribution_pb2 as pb
from protocol.verdict import Verdict, sign_verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from node.trainer.evaluator.offer_count import OfferCount
    from node.trainer.evaluator.offers import Offer, OfferQueue
    from node.trainer.evaluator.trial_builder import TrialBuilder
    from protocol.identity import Identity

logger = logging.getLogger(__name__)

SHARE = 0.1
"""The largest share of the trainer's time that evaluating may take."""

MAX_EVALUATION_S = 60.0
"""How long an offer may take to show its gain before it is refused: the trainer does not train meanwhile."""


class Evaluator:
    """Tries offers. Belongs to the event loop; what computes runs on threads."""

    def __init__(
        self,
        queue: OfferQueue,
        trials: TrialBuilder,
        count: OfferCount,
        identity: Identity,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._trials, self._count = queue, trials, count
        self._identity, self._events, self._clock = identity, events, clock
        self._owed_s = 0.0

    async def after_step(self, seconds: float, stop: asyncio.Event) -> None:
        """A step took so long: try an offer if one waits and the time for the last one is earned.

        Raises DrainingError when `stop` is set, or the trainer is leaving.
        """
        self._owed_s = max(0.0, self._owed_s - seconds)
        offer = self._queue.next()
        if offer is None or self._owed_s:
            return
        began_s = self._clock()
        try:
            await self._evaluate(offer, stop)
        except DrainingError:
            raise
        except Exception as error:  # noqa: BLE001 - task boundary: whatever was offered, the training goes on
            offer.settle(pb.NOT_TESTED, f"it could not be tested: {failure_of(error, 'offer')}")
        took_s = self._clock() - began_s
        self._owed_s = took_s * (1.0 / SHARE - 1.0)
        self._report(offer, took_s)

    async def _evaluate(self, offer: Offer, stop: asyncio.Event) -> None:
        place = ExpertId(offer.offered.layer, offer.offered.expert)
        offer.state, until_s = pb.EVALUATING, self._clock() + MAX_EVALUATION_S
        present, version = await until_stopped(self._trials.present_expert(place), stop)
        # Counted before the first window is met: a trainer that is killed now does not try its luck again.
        number = await asyncio.to_thread(self._count.next)
        trial = await self._trials.build(place, present, offer.weights, number)
        offer.of_windows = trial.of_windows
        while not trial.is_over and self._clock() < until_s and not self._queue.is_left(offer):
            offer.decision = await asyncio.to_thread(trial.go_on)
        self._settle(offer, place, version)

    def _settle(self, offer: Offer, place: ExpertId, version: int) -> None:
        decision = offer.decision
        if self._queue.is_left(offer):
            offer.settle(pb.NOT_TESTED, "its peer has not asked for it any more")
        elif decision is None:
            offer.settle(pb.NOT_TESTED, "there was no time for a single window")
        elif decision.verdict != "accept":
            offer.settle(pb.REFUSED, refusal(decision))
        elif stale := self._trials.staleness(place, version):
            offer.settle(pb.NOT_TESTED, f"it gained, but is stale: {stale}")
        else:
            verdict = Verdict(
                offered=offer.offered,
                version=version,
                n_windows=decision.n_windows,
                low=decision.low,
                high=decision.high,
                issued_s=time.time(),
            )
            offer.settle(pb.GAINED, decision.why, sign_verdict(self._identity, verdict))

    def _report(self, offer: Offer, seconds: float) -> None:
        decision, offered = offer.decision, offer.offered
        state = pb.OfferState.Name(offer.state).lower()
        self._events.emit(
            OfferEvent(
                layer=offered.layer,
                expert=offered.expert,
                peer=offer.caller,
                state=state,
                why=offer.why,
                windows=decision.n_windows if decision else 0,
                low=_finite(decision.low) if decision else None,
                high=_finite(decision.high) if decision else None,
                seconds=round(seconds, 3),
            )
        )
        logger.info("Offer for expert %d of layer %d: %s, %s", offered.expert, offered.layer, state, offer.why)


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
