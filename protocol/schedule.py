"""Learning rate as a function of the run's tokens: the same on trainers and hosts, who never tell each other a rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.manifest import OptimizerConfig


def learning_rate_factor(optimizer: OptimizerConfig, run_tokens: int) -> float:
    """Linear warm-up, then cosine (arXiv 1608.03983) to `final_lr_fraction`; in [0, 1], to multiply a peak rate."""
    if run_tokens < optimizer.warmup_tokens:
        return (run_tokens + 1) / (optimizer.warmup_tokens + 1)
    span = max(1, optimizer.total_tokens - optimizer.warmup_tokens)
    progress = min(1.0, (run_tokens - optimizer.warmup_tokens) / span)
    floor = optimizer.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
