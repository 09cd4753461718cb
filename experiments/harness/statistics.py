"""Means with 95 % intervals, over seeds where there are several, else over held-out windows.

A difference is taken pair by pair, on the same seed and the same windows, before it is averaged: what a seed or a
window has that is easy or hard falls out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.statistics import half_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and half the width of its interval (0: one value, nothing known); `over` says what varied."""

    mean: float
    half_width: float
    over: str

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    @property
    def words(self) -> str:
        """Put a difference of losses in nats per byte into words; below 0 is better."""
        return self.words_in("nats per byte")

    def words_in(self, unit: str) -> str:
        """Put a difference of losses in another unit into words."""
        certain = "" if abs(self.mean) > self.half_width else ", within what chance can do,"
        side = "better" if self.mean < 0 else "worse"
        spread = f" ± {self.half_width:.3f}" if self.half_width else ""
        return f"{abs(self.mean):.3f}{spread} {unit} {side}{certain}"

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half_width:.3f}" if self.half_width else "")


def estimate(values: ArrayLike, over: str) -> Estimate:
    """Student's interval for the mean."""
    mean = float(np.mean(np.asarray(values, dtype=np.float64)))
    return Estimate(mean=mean, half_width=half_width(values), over=over)


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """Mean of `ours - theirs`, each a row of windows per seed, seeds and windows in the same order."""
    pairs = [np.subtract(a, b) for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) == 1:
        return estimate(pairs[0], "windows")
    return estimate([pair.mean() for pair in pairs], "seeds")
