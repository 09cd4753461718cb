"""What a merge leaves open (shares, scales, densities) chosen by its loss on a text, counting how often it is measured.

Two ways are given the same number of tries: differential evolution, and draws at random, which is throwing things at
the wall. Both choose a share for each participant in each layer, and both begin with the plain average.
"""

# Shapes: S participants, G groups of tensors, X = G * S shares in one row, R rows of them.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.optimize import differential_evolution

from experiments.merging.merges import average, by_group, groups, task_arithmetic, ties

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from experiments.merging.merges import Weights

    Floats = NDArray[np.float64]

TEMPERATURES: Final = (0.01, 0.03, 0.1)
"""Nats: how much worse a participant is where its share is smaller by a factor of e."""

SCALES: Final = (0.15, 0.25, 0.35, 0.5, 0.7)
TIES_SCALES: Final = (0.7, 1.0, 1.5)
TIES_DENSITIES: Final = (0.2, 0.5, 1.0)
POPULATION: Final = 8


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A model: its loss on the text that it was chosen on, in nats per byte, and how many were measured to choose it.

    `best_so_far`: the least loss after each measurement, of a search.
    """

    weights: Weights
    nats: float
    evaluations: int
    chosen: str = ""
    best_so_far: list[float] = field(default_factory=list)


class MergeSearch:
    """Over merges of `participants`, which began from `base`; `loss` measures a model on the text to choose on."""

    def __init__(self, base: Weights, participants: Sequence[Weights], loss: Callable[[Weights], float]) -> None:
        self._base, self._participants, self._loss = base, participants, loss
        self._nats_S = [loss(participant) for participant in participants]
        self._groups = groups(base)

    def best_participant(self) -> SearchResult:
        """No merge at all."""
        index = int(np.argmin(self._nats_S))
        nats, chosen = self._nats_S[index], f"participant {index}"
        return SearchResult(weights=self._participants[index], nats=nats, evaluations=len(self._nats_S), chosen=chosen)

    def plain(self) -> SearchResult:
        """The average. Nothing need be measured to make it; its loss is for comparison."""
        merged = average(self._participants)
        return SearchResult(weights=merged, nats=self._loss(merged), evaluations=0)

    def weighted(self) -> SearchResult:
        """The average weighted by exp(-loss / temperature)."""
        merged = {}
        for temperature in TEMPERATURES:
            shares_S = np.exp((min(self._nats_S) - np.array(self._nats_S)) / temperature)
            merged[f"temperature {temperature:g}"] = average(self._participants, shares_S.tolist())
        return self._best(merged, also=len(self._nats_S))

    def scaled(self) -> SearchResult:
        """Task arithmetic."""
        return self._best(
            {f"scale {scale:g}": task_arithmetic(self._base, self._participants, scale) for scale in SCALES}
        )

    def elected(self) -> SearchResult:
        """TIES."""
        return self._best(
            {
                f"density {density:g}, scale {scale:g}": ties(self._base, self._participants, density, scale)
                for density in TIES_DENSITIES
                for scale in TIES_SCALES
            }
        )

    def thrown(self, evaluations: int, rng: np.random.Generator) -> SearchResult:
        """The best of the average and of draws around it."""
        shares_RX = self._draws(evaluations, rng)
        nats_R = [self._loss(self.merged(shares_X)) for shares_X in shares_RX]
        return self._of(shares_RX[int(np.argmin(nats_R))], nats_R)

    def evolved(self, evaluations: int, rng: np.random.Generator) -> SearchResult:
        """Differential evolution (Storn and Price, 1997), from such draws on; `evaluations` in whole populations."""
        seen: list[float] = []

        def measured(shares_X: Floats) -> float:
            seen.append(self._loss(self.merged(shares_X)))
            return seen[-1]

        draws_RX = self._draws(POPULATION, rng)
        found = differential_evolution(
            measured,
            [(0.0, 1.0)] * draws_RX.shape[1],
            strategy="randtobest1bin",
            init=draws_RX,
            maxiter=evaluations // POPULATION - 1,
            tol=0.0,
            polish=False,
            rng=rng,
        )
        return self._of(found.x, seen)

    def merged(self, shares_X: Floats) -> dict[str, Tensor]:
        """The base, and those shares of what the participants learnt."""
        rows = shares_X.reshape(len(self._groups), len(self._participants)).tolist()
        return by_group(self._base, self._participants, dict(zip(self._groups, rows, strict=True)))

    def _draws(self, n: int, rng: np.random.Generator) -> Floats:
        """[n, X]: the average; and shares that are even from 0 up to, row by row, one to four times the average's."""
        even = 1.0 / len(self._participants)
        most_R = np.minimum(1.0, even * 2.0 ** rng.uniform(0.0, 2.0, n))
        shares_RX = rng.uniform(0.0, 1.0, (n, len(self._groups) * len(self._participants))) * most_R[:, None]
        shares_RX[0] = even
        return shares_RX

    def _of(self, shares_X: Floats, nats_R: Sequence[float]) -> SearchResult:
        rows = shares_X.reshape(len(self._groups), len(self._participants))
        sums = zip(self._groups, rows.sum(1), strict=True)
        return SearchResult(
            weights=self.merged(shares_X),
            nats=min(nats_R),
            evaluations=len(nats_R),
            chosen="sums of shares: " + ", ".join(f"{group} {total:.2f}" for group, total in sums),
            best_so_far=np.minimum.accumulate(nats_R).tolist(),
        )

    def _best(self, merged: dict[str, dict[str, Tensor]], also: int = 0) -> SearchResult:
        """Return the best of those; `also` counts what was measured before."""
        nats = {words: self._loss(weights) for words, weights in merged.items()}
        chosen = min(nats, key=lambda words: nats[words])
        return SearchResult(weights=merged[chosen], nats=nats[chosen], evaluations=also + len(nats), chosen=chosen)
