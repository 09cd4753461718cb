"""Intervals around a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

CONFIDENCE = 0.95


def half_width(values: ArrayLike) -> float:
    """Half the width of Student's 95 % interval for the mean; 0 for a single value, of which no spread is known."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:  # noqa: PLR2004 - one value has no spread
        return 0.0
    return float(stats.sem(sample) * stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1))
