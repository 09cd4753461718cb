"""Learning rates: a schedule over the run's tokens, and what averaging with other replicas adds to it.

The schedule is the same on trainers and hosts, who never tell each other a rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protocol.manifest import OptimizerConfig


def learning_rate_factor(optimizer: OptimizerConfig, run_tokens: int) -> float:
    """Linear warm-up, then cosine (arXiv 1608.03983) to `final_lr_fraction`; in [0, 1], to multiply a peak rate."""
    if run_tokens < optimizer.warmup_tokens:
        return (run_tokens + 1) / (optimizer.warmup_tokens + 1)
    span = max(1, optimizer.total_tokens - optimizer.warmup_tokens)
    progress = min(1.0, (run_tokens - optimizer.warmup_tokens) / span)
    floor = optimizer.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def averaged_replicas(works: Sequence[float]) -> float:
    """How many replicas that learn alike are as good as these, given the work of each: from 1 to their number.

    What is averaged by work has the noise of one replica over the square root of this (Kish's effective sample size,
    "Survey Sampling", 1965). Works are finite and not negative; some must be positive.
    """
    return sum(works) ** 2 / sum(work**2 for work in works)


def averaged_rate_scale(works: Sequence[float], most: float) -> float:
    """Factor, from 1 to `most`, of the rate of a replica that is averaged with others; `works` begins with its own.

    Together they learn from a batch that many times as large: the square root rule for Adam (arXiv 2205.10287).
    """
    return min(most, math.sqrt(averaged_replicas(works)))
