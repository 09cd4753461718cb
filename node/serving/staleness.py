"""How large a step a late gradient may take, by the optimizer steps that its experts took since its forward.

The rate is scaled as in staleness-aware asynchronous SGD (arXiv 1511.05950), which divides it by the staleness. Here
gradients up to the run's `max_staleness` count in full, and beyond it the rate falls from there without a jump.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.manifest import AveragingConfig


def staleness_of(version_now: int, version_then: int) -> int:
    """Optimizer steps between two versions; none if the caller claims to come from the future."""
    return max(0, version_now - version_then)


def is_stale(averaging: AveragingConfig, staleness: int) -> bool:
    """Whether a gradient of this age is over the run's limit; a limit of 0 is none."""
    return 0 < averaging.max_staleness < staleness


def rate_scale(averaging: AveragingConfig, staleness: int) -> float | None:
    """What to multiply the learning rate with, in (0, 1]; None to take no step."""
    if not is_stale(averaging, staleness):
        return 1.0
    return None if averaging.stale_action == "refuse" else averaging.max_staleness / staleness
