"""Learning rates, tuned for each arm alike: short runs at a few rates, the best of which the long runs take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from experiments.harness.experiment import Trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.arms.arm import TrainSpec
    from experiments.harness.experiment import Result

RATES = (2e-3, 4e-3, 8e-3)
"""Peak rates, of trunk and experts alike."""

SEED = 1000
"""No long run has it."""


class Tuning:
    """Tuning of the arms of `specs`, on as many tokens as these say; their rates and seeds do not matter."""

    def __init__(self, specs: Sequence[TrainSpec], rates: Sequence[float] = RATES) -> None:
        self._trials = {spec.arm.label: {rate: _trial(spec, rate) for rate in rates} for spec in specs}

    @property
    def trials(self) -> list[Trial]:
        """All of them."""
        return [trial for by_rate in self._trials.values() for trial in by_rate.values()]

    def best(self, results: Mapping[str, Result]) -> dict[str, float]:
        """Rate by arm's label, of arms whose trials all have results."""
        best = {}
        for label, by_rate in self._trials.items():
            if all(trial.name in results for trial in by_rate.values()):
                best[label] = min(by_rate, key=lambda rate: results[by_rate[rate].name]["nats_per_byte"])
        return best


def _trial(spec: TrainSpec, rate: float) -> Trial:
    short = replace(spec, seed=SEED, lr=rate, expert_lr=rate, evaluations=1)
    return Trial(name=f"tune-{short.slug}-lr{rate:g}", spec=short.to_json())
