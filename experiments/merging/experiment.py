"""An experiment of merges: seed by seed trials of several kinds, told once a seed is whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from experiments.harness.experiment import no_results
from experiments.merging.report import MergingResults, merging_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from experiments.harness.experiment import Preset, Report, Result, Trial, TrialContext


class MergingPlan(Protocol):
    """How large a preset is."""

    @property
    def seeds(self) -> int:
        """That each kind is trained with."""

    def trials(self, seed: int) -> list[Trial]:
        """One of each kind, which its spec names."""


P = TypeVar("P", bound=MergingPlan)


@dataclass(frozen=True, kw_only=True)
class MergingExperiment(Generic[P]):
    """See `experiments.harness.experiment.Experiment`; `results_of` reads the results of whole seeds, by kind."""

    name: str
    claim: str
    method: str
    presets: Mapping[Preset, P]
    carry_out: Callable[[dict[str, Any], TrialContext], Result]
    results_of: Callable[[P, Mapping[str, Sequence[Result]]], MergingResults]

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:  # noqa: ARG002 - no stages
        """Seed by seed."""
        plan = self.presets[preset]
        return [trial for seed in range(plan.seeds) for trial in plan.trials(seed)]

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """One trial."""
        return self.carry_out(spec, context)

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Report on those seeds that are whole; raises ConfigError where there is none."""
        plan = self.presets[preset]
        seeds = [plan.trials(seed) for seed in range(plan.seeds)]
        whole = [trials for trials in seeds if all(trial.name in results for trial in trials)]
        if not whole:
            raise no_results(self.name, preset, "a whole seed")
        by_kind: dict[str, list[Result]] = {}
        for trial in (trial for trials in whole for trial in trials):
            by_kind.setdefault(trial.spec["kind"], []).append(results[trial.name])
        return merging_report(self.results_of(plan, by_kind))
