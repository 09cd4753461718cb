"""Updates of one expert for the sequential experiment: real improvements, and changes of their size that gain nothing.

What an update is worth is never assumed from how it was made: its gain over the whole held-out text says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from experiments.sequential.one_expert import trained_further

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from experiments.sequential.one_expert import OneExpert, Reached, Weights

STEPS = (1, 4, 16, 64, 256)
RATE = 1e-3
KINDS = {
    "trained": "trained further on its own tokens",
    "noise": "noise as large as a trained update",
    "flipped": "a trained update, backwards",
    "shuffled": "trained on shuffled bytes",
    "overstepped": "a trained update, stretched until its gain is gone",
}
MAX_STRETCH, HALVINGS = 1024.0, 12


@dataclass(frozen=True, kw_only=True)
class Update:
    """Its making, and the gain of each held-out window, nats per byte."""

    kind: str
    steps: int
    seed: int
    gains: NDArray[np.float64]


@dataclass(frozen=True)
class Workshop:
    """Where updates of one expert are made (`text`) and measured (`held_out`)."""

    expert: OneExpert
    text: Reached
    held_out: Reached

    def updates(self, n_seeds: int) -> Iterator[Update]:
        """Yield one update of every kind, number of steps and seed."""
        for seed in range(n_seeds):
            for steps in STEPS:
                trained = self._difference(steps, seed, shuffled=False)
                for kind in KINDS:
                    gains = self._gains(self._changed(kind, trained, steps, seed))
                    yield Update(kind=kind, steps=steps, seed=seed, gains=gains)

    def _changed(self, kind: str, trained: Weights, steps: int, seed: int) -> Weights:
        if kind == "noise":
            return _noise_like(trained, seed)
        if kind == "flipped":
            return _scaled(trained, -1.0)
        if kind == "shuffled":
            return self._difference(steps, seed, shuffled=True)
        return self._overstepped(trained) if kind == "overstepped" else trained

    def _difference(self, steps: int, seed: int, *, shuffled: bool) -> Weights:
        weights = trained_further(self.expert, self.text, steps=steps, lr=RATE, seed=seed, shuffled=shuffled)
        return {name: weights[name] - present for name, present in self.expert.weights.items()}

    def _gains(self, difference: Weights) -> NDArray[np.float64]:
        offered = {name: present + difference[name] for name, present in self.expert.weights.items()}
        return self.expert.gains(self.held_out, offered)

    def _overstepped(self, trained: Weights) -> Weights:
        """The shortest stretch found that gains nothing: as hard a case as there is for a test against no gain."""
        low, high = 0.0, 1.0
        while high < MAX_STRETCH and self._gains(_scaled(trained, high)).mean() > 0.0:
            low, high = high, 2.0 * high
        for _ in range(HALVINGS if low else 0):
            middle = (low + high) / 2
            gains_nothing = self._gains(_scaled(trained, middle)).mean() <= 0.0
            low, high = (low, middle) if gains_nothing else (middle, high)
        return _scaled(trained, high)


def _scaled(difference: Weights, factor: float) -> Weights:
    return {name: factor * tensor for name, tensor in difference.items()}


def _noise_like(difference: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in difference.items()}
    return {name: noise[name] * (difference[name].norm() / noise[name].norm()) for name in noise}


def stops_by_peeking(gains: NDArray[np.float64], after: int) -> int | None:
    """The control: after how many windows a one-sided t test at 5%, looked at after each, says "better"; or None."""
    n = np.arange(1, len(gains) + 1)
    means = np.cumsum(gains) / n
    deviations = np.sqrt(np.maximum(np.cumsum(gains**2) / n - means**2, 1e-30))
    found = np.flatnonzero((means / deviations * np.sqrt(n))[after:] > 1.645)  # noqa: PLR2004 - 95% of a normal
    return int(found[0]) + after + 1 if len(found) else None


def rate_bound(n_found: int, n: int, confidence: float = 0.95) -> float:
    """Upper end of the exact (Clopper-Pearson) one-sided interval of a rate seen `n_found` times in `n`."""
    return 1.0 if n_found >= n else float(stats.beta.ppf(confidence, n_found + 1, n - n_found))
