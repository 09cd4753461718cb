"""What is measured about a gate's load: dead experts, spread, entropy, overflow. Beside the path of a step."""

# Shapes: E experts of the layer, N the live ones among them.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class GateStats:
    """Load over the recent steps, over the experts that are live; all 0 before the first step.

    dead_fraction: experts not chosen once in the last WINDOW_STEPS steps (or since the start, if that is shorter).
    load_cv: standard deviation of the load over its mean (coefficient of variation); 0 is perfectly even.
    load_max_over_mean: the busiest expert's load over the mean.
    load_entropy_bits: log2(n_live) when even, 0 when one expert takes all.
    overflow_fraction: pairs dropped by capacity over pairs chosen.
    """

    n_live: int = 0
    dead_fraction: float = 0.0
    load_cv: float = 0.0
    load_max_over_mean: float = 0.0
    load_entropy_bits: float = 0.0
    overflow_fraction: float = 0.0


class LoadWindow:
    """Accumulates loads in O(E) per step and memory: an exponential mean, and for each expert the steps it sat idle."""

    def __init__(self, n_experts: int, window_steps: int = WINDOW_STEPS) -> None:
        self._window_steps = window_steps
        self._n_steps = 0
        self._mean_load_E = torch.zeros(n_experts, dtype=torch.float64)
        self._mean_overflow = 0.0
        self._idle_steps_E = torch.zeros(n_experts, dtype=torch.int64)
        self._live_E = torch.ones(n_experts, dtype=torch.bool)

    def observe(self, load_E: Tensor, overflow: int = 0, live_E: Tensor | None = None) -> None:
        """Count one step. An expert that is not live does not grow idle: it had no chance."""
        load_E = load_E.detach().cpu()
        self._live_E = torch.ones_like(self._live_E) if live_E is None else live_E.cpu().clone()
        self._n_steps += 1
        # The first steps weigh evenly; from then on the oldest fade.
        share = 1.0 / min(self._n_steps, self._window_steps)
        self._mean_load_E.lerp_(load_E.double(), share)
        self._mean_overflow += (overflow - self._mean_overflow) * share
        self._idle_steps_E = torch.where(load_E > 0, 0, self._idle_steps_E + self._live_E)

    def stats(self) -> GateStats:
        """The numbers as of the last observed step."""
        load_N = self._mean_load_E[self._live_E]
        total = float(load_N.sum())
        if total <= 0:
            return GateStats(n_live=len(load_N) if self._n_steps else 0)
        mean = total / len(load_N)
        idle_N = self._idle_steps_E[self._live_E]
        return GateStats(
            n_live=len(load_N),
            dead_fraction=float((idle_N >= min(self._window_steps, self._n_steps)).double().mean()),
            load_cv=float(load_N.std(correction=0)) / mean,
            load_max_over_mean=float(load_N.max()) / mean,
            load_entropy_bits=float(torch.special.entr(load_N / total).sum()) / math.log(2.0),
            overflow_fraction=self._mean_overflow / float(self._mean_load_E.sum()),
        )
