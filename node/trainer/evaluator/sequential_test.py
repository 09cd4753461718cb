"""Is an expert's update an improvement? A paired test that stops as soon as it knows. No sockets, no torch.

Beside the path of a step. Held-out windows come in random order, without replacement; each gives one number, the loss
of the present expert less that of the offered one on the same bytes, mean over the window. What depends on what inside
a window does not matter then, and the order being random, nor does what depends on what between windows.

The test is a betting confidence sequence for sampling without replacement (Waudby-Smith and Ramdas, arXiv 2010.09686):
capital that is bet on "the mean gain is above m" cannot grow 1 / alpha fold, at any time, with a probability above
alpha, if it is not above m. So it may be looked at after each window and stopped at will. The bets are a fixed mixture
of fractions, so there is nothing to tune and nothing to fit.

It needs a bound on how much worse a window may become, which losses do not have. The windows up to the `pilot`-th that
changed at all, not bet on, set it: `spread` times their largest difference. A gain above it counts as the bound, which
lowers the mean, and a loss below it rejects the update there and then: both errors are towards rejection. What is left
is an update that is far worse on a share of the windows so small that none of them is met before the decision: n
windows miss a share above 1 - alpha ** (1 / n) with a probability below alpha.
"""

# Shapes: F fractions bet, N windows met after the pilot.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from common.errors import ConfigError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

Verdict = Literal["accept", "reject", "undecided"]

FRACTIONS_F = 0.9 * 2.0 ** -np.arange(9.0)
"""The fractions of the capital that are lost when a window is as bad as the bound allows."""
MAX_NATS = 1e6
"""Per byte; no model that can be trained is so wrong."""
TINY = 1e-300
HALVINGS = 40
"""How often twice the bound is halved to find an end of the interval."""


@dataclass(frozen=True, kw_only=True)
class SequentialTestConfig:
    """Gains in nats per token, of the mean over the whole text.

    An update that gains `margin` or less is accepted with a probability of at most `alpha`; one that gains `worth` or
    more is rejected with at most that, if none of its windows is beyond the bound. One that gains less than `worth` is
    to be rejected, without waiting for its sign.
    """

    alpha: float = 0.05
    margin: float = 0.0
    worth: float = 2e-5
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
    """What is known so far. `low` to `high`: the mean gain, each side with confidence 1 - alpha, at any time.

    `high` is of gains that count as the bound where they are above it.
    """

    verdict: Verdict
    why: str
    low: float
    high: float
    n_windows: int


class SequentialTest:
    """One update's test over `n_total` windows, the whole held-out text, of which any number may be met."""

    def __init__(self, config: SequentialTestConfig, n_total: int) -> None:
        if n_total <= config.pilot:
            raise InvalidInputError("n_total", f"is {n_total}; the test needs more windows than its {config.pilot}")
        self.config, self.n_total, self.n_windows = config, n_total, 0
        self._sum, self._clipped_sum, self._bound = 0.0, 0.0, 0.0
        self._n_changed, self._n_pilot = 0, 0
        self._met: list[float] = []
        self._above, self._below = _Capital(config.margin, 1.0), _Capital(config.worth, -1.0)
        self._refusal = ""

    def add(self, difference: float) -> None:
        """The next window's loss with the present expert less that with the offered one, nats per token."""
        if self.n_windows == self.n_total:
            raise InvalidInputError("difference", f"is one more than the {self.n_total} windows that there are")
        if not abs(difference) <= MAX_NATS:
            self._refusal = self._refusal or f"a window's loss is not finite, or changed by more than {MAX_NATS:g} nats"
            difference = 0.0
        if self._n_changed < self.config.pilot:
            self._bound = max(self._bound, self.config.spread * abs(difference))
            self._n_changed += difference != 0.0
            self._n_pilot += 1
        else:
            self._bet(difference)
        self.n_windows += 1
        self._sum += difference
        self._clipped_sum += min(max(difference, -self._bound), self._bound)

    def decision(self) -> Decision:
        """The verdict after the windows so far."""
        verdict, why = self._verdict()
        low, high = self._interval()
        return Decision(verdict=verdict, why=why, low=low, high=high, n_windows=self.n_windows)

    @property
    def is_decided(self) -> bool:
        """Whether further windows are not needed."""
        return self._verdict()[0] != "undecided"

    def _bet(self, difference: float) -> None:
        if difference < -self._bound:
            loss = f"a window became worse by {-difference:.3g} nats per token, more than {self._bound:.3g}"
            self._refusal = self._refusal or loss
        clipped = min(max(difference, -self._bound), self._bound)
        for capital in (self._above, self._below):
            # What the windows that are left must average, if all of them average the mean that is bet against.
            left = (self.n_total * capital.mean - self._clipped_sum) / (self.n_total - self.n_windows)
            capital.bet(clipped, left, self._bound)
        self._met.append(clipped)

    def _verdict(self) -> tuple[Verdict, str]:
        config, mean = self.config, self._sum / max(1, self.n_windows)
        if self._refusal:
            return "reject", self._refusal
        if self.n_windows == self.n_total:
            is_better = mean > config.margin and mean >= config.worth
            why = f"it gains {mean:.3g} nats per token over the whole held-out text"
            return ("accept" if is_better else "reject"), why
        if self._met:
            needed = math.log(1.0 / config.alpha)
            # First: a gain that is only rounding's may well have a sign.
            if self._below.best >= needed:
                return "reject", f"it gains less than {config.worth:.3g} nats per token"
            if self._above.best >= needed:
                return "accept", f"it gains more than {config.margin:.3g} nats per token"
        return "undecided", f"{self.n_windows} of {self.n_total} windows do not tell yet"

    def _interval(self) -> tuple[float, float]:
        if self.n_windows == self.n_total:
            return (self._sum / self.n_total,) * 2
        if not self._met:
            return -math.inf, math.inf
        return self._end(1.0), self._end(-1.0)

    def _end(self, sign: float) -> float:
        """The mean furthest in the direction of `sign` that bets on the mean lying beyond it have refuted.

        The capital falls the further the mean lies in that direction, as its bet does after every window.
        """
        refuted, possible = -sign * self._bound, sign * self._bound
        if not self._is_refuted(refuted, sign):
            return -sign * math.inf
        for _ in range(HALVINGS):
            middle = (refuted + possible) / 2
            refuted, possible = (middle, possible) if self._is_refuted(middle, sign) else (refuted, middle)
        return refuted

    def _is_refuted(self, mean: float, sign: float) -> bool:
        """Whether the bets on the windows so far, all made against `mean`, have won enough."""
        met_N = np.array(self._met)
        n_left_N = self.n_total - self._n_pilot - np.arange(len(met_N))
        # The pilot's sum is what is left of the whole.
        sum_N = self._clipped_sum - met_N.sum() + np.cumsum(met_N) - met_N
        left_N = (self.n_total * mean - sum_N) / n_left_N
        worst_N = self._bound + sign * left_N
        if bool((worst_N < 0.0).any()):
            return True
        relative_N = sign * (met_N - left_N) / np.maximum(worst_N, TINY)
        log_FN = np.log1p(FRACTIONS_F[:, None] * np.maximum(relative_N, -1.0)).cumsum(axis=1)
        mixed_N = np.logaddexp.reduce(log_FN, axis=0) - math.log(len(FRACTIONS_F))
        return bool(mixed_N.max() >= math.log(1.0 / self.config.alpha))


class _Capital:
    """A gambler's capital, bet on a mean gain beyond `mean`; `best` is the logarithm of the most it has been.

    `sign` 1: above it; -1: below it.
    """

    def __init__(self, mean: float, sign: float) -> None:
        self.mean, self.sign, self.best = mean, sign, 0.0
        self._log_F = np.zeros(len(FRACTIONS_F))

    def bet(self, difference: float, left: float, bound: float) -> None:
        """Bet that `difference`, which is within `bound`, lies beyond `left`, as if it were not known yet.

        Where less than nothing can be lost, the mean has become impossible: no windows left can bring it about.
        """
        worst = bound + self.sign * left
        if worst < 0.0:
            self.best = math.inf
            return
        self._log_F += np.log1p(FRACTIONS_F * max(self.sign * (difference - left) / max(worst, TINY), -1.0))
        top = float(self._log_F.max())
        mixed = top + math.log(float(np.exp(self._log_F - top).mean()))
        self.best = max(self.best, mixed)


def decide(differences: Iterable[float], n_total: int, config: SequentialTestConfig) -> Decision:
    """Take windows until the test knows, or there are no more."""
    test = SequentialTest(config, n_total)
    for difference in differences:
        test.add(difference)
        if test.is_decided:
            break
    return test.decision()
