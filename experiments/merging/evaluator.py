"""Participants that were trained apart put together in every way, each way a row: merges, and choices between them.

Shapes: P participants, N windows, T positions. Log probabilities are those of what came next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from experiments.apart.ensemble import by_posterior, evenly_weighted
from experiments.merging.choosing import PREFIX, by_prefix, by_topic, in_hindsight, models_by_prefix
from experiments.merging.merges import row_of
from experiments.merging.report import AVERAGE, BEST, EVOLVED, POSTERIOR, RANDOM, TASK_ARITHMETIC, TIES, WEIGHTED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from experiments.harness.experiment import Result
    from experiments.merging.merges import Weights
    from experiments.merging.search import MergeSearch, SearchResult

OTHERS = 40
"""About as many models are measured besides those of the two searches."""


class Measure(Protocol):
    """Puts weights into a model and runs it over text."""

    def chosen_on(self, weights: Weights) -> float:
        """Nats per byte or token of the text to choose on."""

    def log_likelihood(self, weights: Weights) -> torch.Tensor:
        """[N, T] float64, of the text for the figures."""


class MergeEvaluator:
    """Where models of one shape are measured, one after the other."""

    def __init__(self, measure: Measure, evaluations: int, progress: Callable[[float, float, str], None]) -> None:
        """Each search may take this many `evaluations`."""
        self.log_likelihood = measure.log_likelihood
        self._measure, self._evaluations, self._progress = measure, evaluations, progress
        self._done = 0

    def loss(self, weights: Weights) -> float:
        """Return the loss on the text to choose on."""
        self._done += 1
        self._progress(self._done, max(self._done, 2 * self._evaluations + OTHERS), "models measured")
        return self._measure.chosen_on(weights)

    def figure(self, weights: Weights) -> float:
        """Return the loss on the text for the figures."""
        return -float(self.log_likelihood(weights).mean())

    def merges(self, search: MergeSearch, seed: int) -> dict[str, Result]:
        """A row for each way to make one model."""
        tries = self._evaluations
        makers: dict[str, Callable[[], SearchResult]] = {
            BEST: search.best_participant,
            AVERAGE: search.plain,
            WEIGHTED: search.weighted,
            TASK_ARITHMETIC: search.scaled,
            TIES: search.elected,
            EVOLVED: lambda: search.evolved(tries, np.random.default_rng([seed, 1])),
            RANDOM: lambda: search.thrown(tries, np.random.default_rng([seed, 2])),
        }
        return {name: self._way(make()) for name, make in makers.items()}

    def _way(self, found: SearchResult) -> Result:
        row = {"nats": self.figure(found.weights), "chosen_nats": found.nats, "evaluations": found.evaluations}
        return row | {"models": 1.0, "chosen": found.chosen, "best_so_far": found.best_so_far}


def chosen_between(log_p_PNT: torch.Tensor, owner_N: torch.Tensor, unit: str, label: str) -> dict[str, Result]:
    """Rows of the ways that keep the participants as they are; `label` tells whose a window is.

    None needs a text to choose on.
    """
    n_models, _, n_positions = log_p_PNT.shape
    ways = {
        "even ensemble": (evenly_weighted(log_p_PNT), n_models),
        POSTERIOR: (by_posterior(log_p_PNT), n_models),
        f"one, by {PREFIX} {unit}s": (by_prefix(log_p_PNT), models_by_prefix(n_models, n_positions)),
        f"one, told the {label}": (by_topic(log_p_PNT, owner_N), 1.0),
        "one, in hindsight": (in_hindsight(log_p_PNT), n_models),
    }
    return {name: unsearched(float(nats_N.mean()), models) for name, (nats_N, models) in ways.items()}


def unsearched(nats: float, models: float) -> Result:
    """A row of a way for which nothing was measured; so many models are run."""
    return {"nats": nats, "evaluations": 0, "models": float(models)}


def ways_apart(base: Weights, participants: Sequence[Weights]) -> tuple[float, float, float]:
    """Length of the base; mean length of the participants' ways from it; mean cosine between two of them."""
    start_W = row_of(base)
    ways = [row_of(weights) - start_W for weights in participants]
    unit_PW = torch.stack([way / way.norm() for way in ways])
    cosines = (unit_PW @ unit_PW.T)[~torch.eye(len(ways), dtype=torch.bool)]
    length = torch.stack([way.norm() for way in ways]).mean()
    return float(start_W.norm()), float(length), float(cosines.mean())
