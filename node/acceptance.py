"""Is an expert's update an improvement? A paired test that stops as soon as it knows. No sockets, no torch.

Beside the path of a step. Held-out windows come in random order, without replacement; each gives one number, the loss
of the present expert less that of the offered one on the same bytes, mean over the window. What depends on what inside
a window does not matter then, and the order being random, nor does what depends on what between windows.

The test is a betting confidence sequence for sampling without replacement (Waudby-Smith and Ramdas, arXiv 2010.09686,
section 5): capital that is bet on "the mean gain is above m" cannot grow 1 / alpha fold, at any time, with a
probability above alpha, if it is not above m. So it may be looked at after each window and stopped at will. The bets
are a fixed mixture of fractions, so there is nothing to tune and nothing to fit.

It needs a bound on how much worse a window may become, which losses do not have. The first `pilot` windows, not bet
on, set it: `spread` times their largest difference. A gain above it counts as the bound, which lowers the mean, and a
loss below it rejects the update there and then: both errors are towards rejection. What is left is an update that is
far worse on a share of the windows so small that none of them is met before the decision; see `undetected_share`.
"""

# Shapes: F fractions bet, M means that are tested.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from protocol.errors import ConfigError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Verdict = Literal["accept", "reject", "undecided"]

FRACTIONS_F = 0.9 * 2.0 ** -np.arange(9.0)
"""Of the capital, lost when a window is as bad as the bound allows."""
MAX_NATS = 1e6
"""Per byte; no model that can be trained is so wrong."""
GRID = 201
"""Means that the interval is made of, over twice the bound."""


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig:
    """Differences and means in nats per byte. An error of either kind has a probability of at most `alpha`.

    `margin`: what an accepted update must gain more than; `worth`: an update that gains less than that is rejected
    without waiting for its sign.
    """

    alpha: float = 0.05
    margin: float = 0.0
    worth: float = 2e-4
    pilot: int = 64
    spread: float = 4.0

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ConfigError(f"alpha: is {self.alpha}, must lie between 0 and 1; 0.05 is usual.")
        if not (math.isfinite(self.margin) and math.isfinite(self.worth) and self.margin <= self.worth):
            raise ConfigError(f"margin, worth: are {self.margin}, {self.worth}; finite, the margin not above worth.")
        if self.pilot < 1 or not (math.isfinite(self.spread) and self.spread > 1.0):
            raise ConfigError(f"pilot, spread: are {self.pilot}, {self.spread}; at least 1, and more than 1.")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is known so far. `low` to `high`: the mean gain, each side with confidence 1 - alpha, at any time."""

    verdict: Verdict
    why: str
    low: float
    high: float
    n_windows: int


class AcceptanceTest:
    """One update's test over `n_total` windows, the whole held-out text, of which any number may be met."""

    def __init__(self, config: AcceptanceConfig, n_total: int) -> None:
        if n_total <= config.pilot:
            raise InvalidInputError("n_total", f"is {n_total}; the test needs more windows than its {config.pilot}")
        self.config, self.n_total, self.n_windows = config, n_total, 0
        self._sum, self._clipped_sum, self._bound = 0.0, 0.0, 0.0
        self._means_M: Floats = np.array([config.margin, config.worth])
        self._above, self._below = _Capital(0), _Capital(0)
        self._refusal = ""

    def add(self, difference: float) -> None:
        """The next window's loss with the present expert less that with the offered one, nats per byte."""
        if self.n_windows == self.n_total:
            raise InvalidInputError("difference", f"is one more than the {self.n_total} windows that there are")
        if not abs(difference) <= MAX_NATS:
            self._refusal = self._refusal or f"a window's loss is not finite, or changed by more than {MAX_NATS:g} nats"
            difference = 0.0
        if self.n_windows < self.config.pilot:
            self._bound = max(self._bound, self.config.spread * abs(difference))
        else:
            self._bet(difference)
        self.n_windows += 1
        self._sum += difference
        self._clipped_sum += min(difference, self._bound)
        if self.n_windows == self.config.pilot:
            self._begin()

    def decision(self) -> Decision:
        """The verdict after the windows so far."""
        verdict, why = self._verdict()
        low, high = self._interval()
        return Decision(verdict=verdict, why=why, low=low, high=high, n_windows=self.n_windows)

    @property
    def is_decided(self) -> bool:
        """Whether further windows are not needed."""
        return self._verdict()[0] != "undecided"

    def _begin(self) -> None:
        bound = self._bound
        self._means_M = np.concatenate((self._means_M[:2], np.linspace(-bound, bound, GRID)))
        self._above, self._below = _Capital(len(self._means_M)), _Capital(len(self._means_M))

    def _bet(self, difference: float) -> None:
        if difference < -self._bound:
            loss = f"a window became worse by {-difference:.3g} nats per byte, more than {self._bound:.3g}"
            self._refusal = self._refusal or loss
        # What the windows that are left must average, if all of them average m.
        left_M = (self.n_total * self._means_M - self._clipped_sum) / (self.n_total - self.n_windows)
        gain_M = min(difference, self._bound) - left_M
        self._above.bet(gain_M, self._bound + left_M)
        self._below.bet(-gain_M, self._bound - left_M)

    def _verdict(self) -> tuple[Verdict, str]:
        config, mean = self.config, self._sum / max(1, self.n_windows)
        if self._refusal:
            return "reject", self._refusal
        if self.n_windows == self.n_total:
            gains = mean > config.margin
            return ("accept" if gains else "reject"), f"it gains {mean:.3g} nats per byte over the whole held-out text"
        if self.n_windows > config.pilot:
            needed = math.log(1.0 / config.alpha)
            if self._above.best_M[0] >= needed:
                return "accept", f"it gains more than {config.margin:.3g} nats per byte"
            if self._below.best_M[1] >= needed:
                return "reject", f"it gains less than {config.worth:.3g} nats per byte"
        return "undecided", f"{self.n_windows} of {self.n_total} windows do not tell yet"

    def _interval(self) -> tuple[float, float]:
        if self.n_windows == self.n_total:
            return (self._sum / self.n_total,) * 2
        if self.n_windows <= self.config.pilot:
            return -math.inf, math.inf
        needed, grid_M = math.log(1.0 / self.config.alpha), self._means_M[2:]
        n_below = _run_of_true(self._above.best_M[2:] >= needed)
        n_above = _run_of_true(self._below.best_M[2:][::-1] >= needed)
        low = float(grid_M[n_below - 1]) if n_below else -math.inf
        return low, (float(grid_M[-n_above]) if n_above else math.inf)


class _Capital:
    """Of a gambler who bets against each mean; `best_M`, the logarithm of the most it has been."""

    def __init__(self, n_means: int) -> None:
        self._log_FM = np.zeros((len(FRACTIONS_F), n_means))
        self.best_M = np.zeros(n_means)

    def bet(self, gain_M: Floats, worst_M: Floats) -> None:
        """`gain_M`: what the bet on each mean brings; `worst_M`: the most that it could have lost.

        Where nothing can be lost, the mean has become impossible: no order of the windows left can bring it about.
        """
        possible_M = worst_M > 0.0
        relative_M = np.where(possible_M, gain_M, 0.0) / np.where(possible_M, worst_M, 1.0)
        self._log_FM += np.log1p(np.maximum(FRACTIONS_F[:, None] * relative_M, -1.0 + 1e-12))
        mixed_M = np.logaddexp.reduce(self._log_FM, axis=0) - math.log(len(FRACTIONS_F))
        self.best_M = np.maximum(self.best_M, np.where(possible_M, mixed_M, math.inf))


def decide(differences: Iterable[float], n_total: int, config: AcceptanceConfig) -> Decision:
    """Take windows until the test knows, or there are no more."""
    test = AcceptanceTest(config, n_total)
    for difference in differences:
        test.add(difference)
        if test.is_decided:
            break
    return test.decision()


def undetected_share(n_windows: int, alpha: float) -> float:
    """Share of windows worse than the bound above which `n_windows` of them miss all with a probability below alpha."""
    return 1.0 - math.exp(math.log(alpha) / n_windows)


def _run_of_true(flags: NDArray[np.bool_]) -> int:
    """How many lead."""
    return len(flags) if bool(flags.all()) else int(np.argmin(flags))
