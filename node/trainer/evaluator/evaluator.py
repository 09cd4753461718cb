"""A trainer as evaluator: between two of its steps it tries the offer that waits longest, a tenth of its time at most.

In one go: the present expert is trained on meanwhile by the run's other trainers, and by this one after every step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import CheckpointError, DrainingError, KilohiveError
from common.tasks import until_stopped
from node.model.expert_file import ExpertId
from node.rpc.handlers import failure_of
from node.trainer.evaluator.fetch_expert import fetch_expert
from node.trainer.evaluator.held_out_trial import HeldOutTrial, config_of, refusal
from node.trainer.evaluator.paired_experts import PairedExperts, paired_experts_model
from node.trainer.events import OfferEvent
from protocol import contribution_pb2 as pb
from protocol.verdict import Verdict, sign_verdict, steps_between

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from common.events import EventLog
    from dht.view import Replica
    from node.averaging.joining import Downloader
    from node.model.expert_file import Weights
    from node.model.moe import Experts
    from node.trainer.evaluator.offers import Offer, OfferQueue
    from node.trainer.train_step import Training
    from protocol.identity import Identity
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

SHARE = 0.1
"""Of the trainer's time, at most."""

MAX_EVALUATION_S = 60.0
"""After which an offer that has not shown its gain is refused: the trainer does not train meanwhile."""

COUNT_FILE = "offers.json"


@dataclass(frozen=True, kw_only=True)
class EvaluatorParts:
    """What an evaluator works with; `replicas` are those of a block that can be called, `out` the trainer's folder."""

    identity: Identity
    training: Training
    experts: Experts
    client: Downloader
    replicas: Callable[[BlockId], Sequence[Replica]]
    events: EventLog
    out: Path


class Evaluator:
    """Tries offers. Belongs to the event loop; what computes runs on threads."""

    def __init__(self, parts: EvaluatorParts, queue: OfferQueue, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises CheckpointError if the count of the offers tried so far cannot be read."""
        self._parts, self._queue, self._clock = parts, queue, clock
        self._manifest = parts.training.manifest
        self._count = _Count(parts.out, self._manifest.run_id)
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
        self._tell(offer, took_s)

    async def _evaluate(self, offer: Offer, stop: asyncio.Event) -> None:
        parts, place = self._parts, ExpertId(offer.offered.layer, offer.offered.expert)
        offer.state, until_s = pb.EVALUATING, self._clock() + MAX_EVALUATION_S
        replicas = parts.replicas(place.block(self._manifest.model))
        fetching = fetch_expert(parts.client, replicas, place, self._manifest)
        present, version = await until_stopped(fetching, stop)
        # Counted before the first window is met: a trainer that is killed now does not try its luck again.
        number = await asyncio.to_thread(self._count.next)
        trunk = await asyncio.wrap_future(parts.training.look(self._trunk))
        trial = await asyncio.to_thread(self._trial, place, (present, offer.weights), trunk, number)
        offer.of_windows = trial.of_windows
        while not trial.is_over and self._clock() < until_s and not self._queue.is_left(offer):
            offer.decision = await asyncio.to_thread(trial.go_on)
        self._settle(offer, place, version)

    def _trunk(self) -> dict[str, torch.Tensor]:
        return {name: t.detach().clone() for name, t in self._parts.training.model.state_dict().items()}

    def _trial(
        self, place: ExpertId, paired_experts: tuple[Weights, Weights], trunk: dict[str, torch.Tensor], number: int
    ) -> HeldOutTrial:
        training, manifest = self._parts.training, self._manifest
        model = paired_experts_model(
            manifest, trunk, PairedExperts(self._parts.experts, place, *paired_experts, manifest)
        )
        return HeldOutTrial(model, training.dataset, config_of(manifest.model, number), training.config.batch)

    def _settle(self, offer: Offer, place: ExpertId, version: int) -> None:
        decision = offer.decision
        if self._queue.is_left(offer):
            offer.settle(pb.NOT_TESTED, "its peer has not asked for it any more")
        elif decision is None:
            offer.settle(pb.NOT_TESTED, "there was no time for a single window")
        elif decision.verdict != "accept":
            offer.settle(pb.REFUSED, refusal(decision))
        elif stale := self._staleness(place, version):
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
            offer.settle(pb.GAINED, decision.why, sign_verdict(self._parts.identity, verdict))

    def _staleness(self, place: ExpertId, version: int) -> str:
        """Why hosts would not take it in any more; empty if they would."""
        block_id = place.block(self._manifest.model)
        newest = max((replica.version for replica in self._parts.replicas(block_id)), default=version)
        limit = steps_between(self._manifest.averaging.max_staleness, newest)
        if limit is None or newest - version <= limit:
            return ""
        return f"block {block_id} took {newest - version} steps meanwhile, the limit is {limit}"

    def _tell(self, offer: Offer, seconds: float) -> None:
        decision, offered = offer.decision, offer.offered
        state = pb.OfferState.Name(offer.state).lower()
        self._parts.events.emit(
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


class _Count:
    """How many offers this trainer has tried in a run, over its whole life: each further one must show more."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._path, self._run_id = folder / COUNT_FILE, run_id
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
            self._tried = int(stored.get(run_id, 0))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"cannot read {self._path} ({error}): restore it, or delete it") from None

    def next(self) -> int:
        """The number of the one that is tried now, from 1, once it is on the disk."""
        self._tried += 1
        try:
            write_atomically(self._path, json.dumps({self._run_id: self._tried}).encode())
        except OSError as error:
            raise KilohiveError(f"cannot write {self._path}: {error.strerror}") from error
        return self._tried


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
