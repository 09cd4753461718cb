"""The arms of the adapters experiment: what is trained, how it is put together, the trials of a preset, their results.

Several arms may come from one training: adapters that were trained apart are tested alone, merged, and behind Arrow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.adapters.adapting import AdapterGrid, AdapterRun
from experiments.adapters.domains import WEAK
from experiments.adapters.seed import TextPlan
from experiments.arms.tuning import SEED as TUNING_SEED
from experiments.harness.experiment import Trial
from experiments.harness.statistics import Estimate, difference, estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.adapters.domains import DomainName
    from experiments.harness.experiment import Result

Way = Literal["alone", "gated", "own", "merged", "arrow-1", "arrow-all"]
"""How adapters meet a token: there are none; by the gate that was trained with them; its domain's own; the mean of all;
the one, or all, that Arrow chooses and weighs."""

UNTUNED_RATE = 3e-2
ALONE = "seed-alone"
"""Name of the trial that trains nothing."""


@dataclass(frozen=True, kw_only=True)
class AdapterArm:
    """One row of the page. Without a grid it is the seed alone."""

    label: str
    way: Way
    grid: AdapterGrid | None = None
    hosts: int = 0
    """That hold its adapters; none: they are in the trial's process."""

    @property
    def is_apart(self) -> bool:
        """Whether its adapters are trained each on one domain's text."""
        return self.way not in {"alone", "gated"}

    @property
    def active_rank(self) -> int:
        """Rank that works for one token in one layer."""
        if self.grid is None:
            return 0
        return self.grid.rank * (len(WEAK) if self.way in {"merged", "arrow-all"} else self.grid.per_token)

    def training(self, rate: float) -> str:
        """What its training is called: arms that share one share its trials."""
        grid = self.grid
        if grid is None:
            return ALONE
        words = "apart" if self.is_apart else f"{grid.per_token}-of-{grid.experts}"
        return f"{words}-rank{grid.rank}-lr{rate:g}"


@dataclass(frozen=True, kw_only=True)
class AdapterTrial:
    """One training, and the ways in which it is tested. Without a run it is the seed alone."""

    text: TextPlan
    ways: tuple[Way, ...]
    windows: int = 0
    """How many windows of each domain's training text it learns from."""

    is_tuning: bool = False
    is_apart: bool = False
    run: AdapterRun | None = None
    hosts: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the arm as a trial's spec; hosts only where there are any, so that older results still fit."""
        spec = asdict(self)
        if not self.hosts:
            del spec["hosts"]
        return spec

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> AdapterTrial:
        """What `to_json` gave."""
        run = spec["run"] and AdapterRun(**{**spec["run"], "grid": AdapterGrid(**spec["run"]["grid"])})
        return cls(**{**spec, "text": TextPlan(**spec["text"]), "ways": tuple(spec["ways"]), "run": run})


@dataclass(frozen=True, kw_only=True)
class AdapterArms:
    """Arms to train with so many seeds each, on `text`; without rates to try, at UNTUNED_RATE."""

    arms: tuple[AdapterArm, ...]
    text: TextPlan
    seeds: int
    rates: tuple[float, ...] = ()
    tuning_windows: int = 0
    """How many windows of each domain an arm that learns from the mix is tuned on; those trained apart take three times
    as many.

    So each of their adapters takes as many steps: how far it has moved is what Arrow and a mean depend on.
    """

    def plan(self, results: Mapping[str, Result]) -> list[Trial]:
        """The seed alone, which computes what all others need; then rates; then arms whose rate is known."""
        alone = Trial(name=ALONE, spec=AdapterTrial(text=self.text, ways=("alone",)).to_json())
        if ALONE not in results:
            return [alone]
        tried = [(arm, rate) for arm in self.trained for rate in self.rates]
        rates = self.best(results)
        known = [(arm, rates[arm.label]) for arm in self.trained if arm.label in rates]
        final = [trial for seed in range(self.seeds) for trial in self._trials(known, seed)]
        return [alone, *self._trials(tried, TUNING_SEED), *final]

    @property
    def trained(self) -> list[AdapterArm]:
        """All arms but the seed alone."""
        return [arm for arm in self.arms if arm.grid is not None]

    def best(self, results: Mapping[str, Result]) -> dict[str, float]:
        """Rate by arm's label, of arms whose tuning trials all have results: each is tuned for its own way."""
        if not self.rates:
            return {arm.label: UNTUNED_RATE for arm in self.trained}
        found = {}
        for arm in self.trained:
            names = {rate: trial_name(arm, rate, TUNING_SEED) for rate in self.rates}
            if all(name in results for name in names.values()):
                nats = {rate: np.mean(windows_of(results[name], arm.way, WEAK)) for rate, name in names.items()}
                found[arm.label] = min(nats, key=lambda rate: nats[rate])
        return found

    def _trials(self, rated: Sequence[tuple[AdapterArm, float]], seed: int) -> list[Trial]:
        """One for each training that these arms need."""
        sharing: dict[str, list[tuple[AdapterArm, float]]] = {}
        for arm, rate in rated:
            sharing.setdefault(trial_name(arm, rate, seed), []).append((arm, rate))
        specs = {name: self._spec(own, seed) for name, own in sharing.items()}
        return [Trial(name=name, spec=spec.to_json(), alone=spec.hosts > 0) for name, spec in specs.items()]

    def _spec(self, sharing: Sequence[tuple[AdapterArm, float]], seed: int) -> AdapterTrial:
        (arm, rate), is_tuning = sharing[0], seed == TUNING_SEED
        tuning_windows = self.tuning_windows * (len(WEAK) if arm.is_apart else 1)
        return AdapterTrial(
            text=self.text,
            ways=tuple(dict.fromkeys(arm.way for arm, _ in sharing)),
            windows=tuning_windows if is_tuning else self.text.training,
            is_tuning=is_tuning,
            is_apart=arm.is_apart,
            run=AdapterRun(grid=arm.grid, layers=self.text.layers, rate=rate, seed=seed) if arm.grid else None,
            hosts=0 if is_tuning else arm.hosts,
        )


def trial_name(arm: AdapterArm, rate: float, seed: int) -> str:
    """Name the trial of an arm's training, which others may share; a hosted arm has its local twin's rate."""
    training = arm.training(rate)
    if seed == TUNING_SEED:
        return f"tune-{training}"
    return f"{training}-{f'{arm.hosts}-hosts-' if arm.hosts else ''}seed{seed}"


def windows_of(result: Result, way: Way, domains: Sequence[DomainName]) -> list[float]:
    """Nats per token of each window of these domains, which have equally many."""
    nats: dict[str, list[float]] = result["nats"][way]
    return [value for name in domains for value in nats[name]]


class AdapterResults:
    """Results of the long trials, by the arm's label."""

    def __init__(self, arms: AdapterArms, results: Mapping[str, Result]) -> None:
        self.arms = arms
        self.rates = arms.best(results)
        self._results = results
        self._rows: dict[str, dict[int, Result]] = {}
        for arm in arms.arms:
            names = {seed: self._name(arm, seed) for seed in range(arms.seeds)}
            self._rows[arm.label] = {seed: results[name] for seed, name in names.items() if name in results}

    def _name(self, arm: AdapterArm, seed: int) -> str:
        if arm.grid is None:
            return ALONE
        return trial_name(arm, self.rates[arm.label], seed) if arm.label in self.rates else ""

    @property
    def missing(self) -> list[str]:
        """Arms without any result."""
        return [label for label, rows in self._rows.items() if not rows]

    def rows(self, arm: AdapterArm) -> list[Result]:
        """Return the arm's rows by seed; the seed model alone has the same row for all."""
        return list(self._rows[arm.label].values())

    def tuning(self, arm: AdapterArm) -> dict[float, Result]:
        """Return the losses of the arm's short trials, by rate."""
        names = {rate: trial_name(arm, rate, TUNING_SEED) for rate in self.arms.rates}
        return {rate: self._results[name] for rate, name in names.items() if name in self._results}

    def nats(self, arm: AdapterArm, domains: Sequence[DomainName]) -> Estimate:
        """Held-out nats per token, mean over the domains."""
        rows = self._rows[arm.label].values()
        values = [float(np.mean(windows_of(row, arm.way, domains))) for row in rows]
        return estimate(values[:1] if arm.grid is None else values, "seeds")

    def difference(self, arm: AdapterArm, against: AdapterArm, domains: Sequence[DomainName]) -> Estimate:
        """Return the difference of held-out nats per token over the seeds that both have; below 0 is better."""
        ours, theirs = self._rows[arm.label], self._rows[against.label]
        seeds = sorted(ours.keys() & theirs.keys())
        return difference(
            [windows_of(ours[seed], arm.way, domains) for seed in seeds],
            [windows_of(theirs[seed], against.way, domains) for seed in seeds],
        )
