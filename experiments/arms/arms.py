"""Experiments whose trials are training runs of several arms: their plan, and their results by arm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from experiments.arms.arm import Arm, Cost, TrainSpec, cost
from experiments.arms.training import train
from experiments.arms.tuning import RATES, Tuning
from experiments.harness.experiment import Trial, no_results
from experiments.harness.statistics import Estimate, difference, estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from experiments.arms.text import TextName
    from experiments.harness.experiment import Preset, Report, Result, TrialContext

UNTUNED_RATE = 4e-3


@dataclass(frozen=True, kw_only=True)
class Arms:
    """Arms to train with so many seeds each; without tokens for tuning every rate is UNTUNED_RATE."""

    arms: tuple[Arm, ...]
    tokens: int
    seeds: int
    tuning_tokens: int = 0
    rates: tuple[float, ...] = RATES
    """Tried on those tokens."""
    text: TextName = "summaries"
    tokens_of: Mapping[str, int] = field(default_factory=dict)
    """By label, for arms that train on another number of tokens."""

    def plan(self, results: Mapping[str, Result]) -> list[Trial]:
        """Rates first; then, seed by seed, every arm whose rate is known."""
        specs = [self._spec(arm, 0, UNTUNED_RATE) for arm in self.arms]
        short = [replace(spec, tokens=self.tuning_tokens) for spec in specs] if self.tuning_tokens else []
        tuning = Tuning(short, self.rates)
        rates = tuning.best(results) if self.tuning_tokens else dict.fromkeys(self.labels, UNTUNED_RATE)
        known = [arm for arm in self.arms if arm.label in rates]
        return [
            *tuning.trials,
            *(self._trial(arm, seed, rates[arm.label]) for seed in range(self.seeds) for arm in known),
        ]

    @property
    def labels(self) -> list[str]:
        """The labels of the arms."""
        return [arm.label for arm in self.arms]

    def _spec(self, arm: Arm, seed: int, rate: float) -> TrainSpec:
        tokens = self.tokens_of.get(arm.label, self.tokens)
        return TrainSpec(arm=arm, seed=seed, tokens=tokens, lr=rate, expert_lr=rate, text=self.text)

    def _trial(self, arm: Arm, seed: int, rate: float) -> Trial:
        spec = self._spec(arm, seed, rate)
        return Trial(name=f"{spec.slug}-seed{seed}", spec=spec.to_json())


@dataclass(frozen=True, kw_only=True)
class ArmsExperiment:
    """An experiment whose trials are training runs of arms; see `experiments.harness.experiment.Experiment`."""

    name: str
    claim: str
    method: str
    presets: Mapping[Preset, Arms]
    report_of: Callable[[ArmResults], Report]

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:
        """Rates first, then every arm with each seed."""
        return self.presets[preset].plan(results)

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """One training run."""
        return train(spec, context)

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Report on the runs that have a result; raises ConfigError where an arm has none."""
        found = ArmResults(self.plan(preset, results), results)
        missing = [label for label in self.presets[preset].labels if label not in found.labels]
        if missing:
            raise no_results(self.name, preset, missing[0])
        return self.report_of(found)


class ArmResults:
    """Results of the long runs, by the arm's label; arms in the order of the plan."""

    def __init__(self, trials: Sequence[Trial], results: Mapping[str, Result]) -> None:
        self._rows: dict[str, list[tuple[TrainSpec, Result]]] = {}
        self.rates_tried = set[float]()
        for trial in trials:
            spec = TrainSpec.from_json(trial.spec)
            if trial.name.startswith("tune-"):
                self.rates_tried.add(spec.lr)
            elif trial.name in results:
                self._rows.setdefault(spec.arm.label, []).append((spec, results[trial.name]))
        self.labels = tuple(self._rows)

    def spec(self, label: str) -> TrainSpec:
        """Return the spec of the arm's first seed."""
        return self._rows[label][0][0]

    def cost(self, label: str) -> Cost:
        """Return the cost of the arm's model."""
        return cost(self.spec(label))

    def results(self, label: str) -> list[Result]:
        """Return the arm's results by seed."""
        return [result for _, result in self._rows[label]]

    def mean(self, label: str) -> float:
        """Held-out nats per byte, mean of the seeds."""
        return self.nats(label).mean

    def nats(self, label: str) -> Estimate:
        """Held-out nats per byte at the end."""
        return estimate([result["nats_per_byte"] for result in self.results(label)], "seeds")

    def difference(self, label: str, against: str) -> Estimate:
        """Return the difference of held-out nats per byte over the seeds that both have; below 0 is better."""
        ours, theirs = self._windows(label), self._windows(against)
        seeds = sorted(ours.keys() & theirs.keys())
        return difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])

    def compared(self, label: str, others: Sequence[Arm]) -> list[str]:
        """Say of each of the `others` that has results how much better or worse than it an arm is."""
        known = [arm.label for arm in others if arm.label in self.labels]
        return [f"{self.difference(label, other).words} than {other}" for other in known]

    def _windows(self, label: str) -> dict[int, list[float]]:
        return {spec.seed: result["window_nats"] for spec, result in self._rows[label]}
