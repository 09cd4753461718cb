"""What a trainer announces of its measurements, for whoever looks at the run: fed by its events, as its display is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.errors import RecordError
from node.trainer.events import EvalEvent, StepEvent
from protocol.reports import MAX_BITS_PER_BYTE, MAX_EVALUATIONS, TrainerReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.events import Event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """The latest evaluation and, of the `n` before it, each `every`-th from the first on; MAX_EVALUATIONS at most."""

    kept: tuple[EvalEvent, ...] = ()
    every: int = 1
    n: int = 0
    latest: EvalEvent | None = None

    @property
    def points(self) -> tuple[EvalEvent, ...]:
        """Return them in the order in which they were made, at more tokens each."""
        return self.kept if self.latest is None else (*self.kept, self.latest)

    def and_then(self, event: EvalEvent) -> _HeldOut:
        """Add one; at the same tokens it takes the latest one's place."""
        if self.latest is None or event.run_tokens <= self.latest.run_tokens:
            kept = tuple(point for point in self.kept if point.run_tokens < event.run_tokens)
            return replace(self, kept=kept, latest=event)
        kept, every = self.kept, self.every
        if self.n % every == 0:
            kept = (*kept, self.latest)
        if len(kept) >= MAX_EVALUATIONS:
            kept, every = kept[::2], 2 * every
        return _HeldOut(kept=kept, every=every, n=self.n + 1, latest=event)


class RunReport:
    """One trainer's report as of its latest step; `latest` is None before that. Fed from any thread, read in any."""

    def __init__(self) -> None:
        self._held_out = _HeldOut()
        self.latest: TrainerReport | None = None

    def on_event(self, event: Event, t_s: float) -> None:  # noqa: ARG002 - what listens to events is given their time
        """Take one event."""
        match event:
            case EvalEvent(bits_per_byte=bits) if 0 <= bits <= MAX_BITS_PER_BYTE:
                self._held_out = self._held_out.and_then(event)
            case StepEvent():
                self.latest = _report(event, self._held_out.points) or self.latest


def _report(step: StepEvent, held_out: Sequence[EvalEvent]) -> TrainerReport | None:
    """What is announced after a step; None where a number of it cannot be, as when a training diverges."""
    gate = step.gate
    try:
        return TrainerReport(
            step=step.step,
            run_tokens=step.run_tokens,
            train_bits_per_byte=step.bits_per_byte,
            tokens_per_s=step.tokens_per_s,
            staleness=step.staleness.mean,
            calls_ok=step.calls_ok,
            calls_failed=step.calls_failed,
            wire_bytes=step.wire_bytes,
            load_entropy_bits=gate.entropy_bits_by_layer,
            load_cv=gate.load_cv_by_layer,
            dead_experts=gate.dead_by_layer,
            evaluated_tokens=tuple(point.run_tokens for point in held_out),
            held_out_bits_per_byte=tuple(point.bits_per_byte for point in held_out),
        )
    except RecordError as error:
        logger.debug("step %d is not reported: %s", step.step, error)
        return None
