"""What is measured of what gates choose: dead experts, spread, entropy, overflow. Beside the path of a step."""

# Shapes: E experts of the layer, N the live ones among them, T tokens, K experts per token.

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
    effective_k: the experts that a token's weights amount to, 1 / sum of their squares; K when they weigh alike.
    kept_fraction: the part of some held-out tokens' experts that were theirs at the look before; None until there was
        one. See `ChoiceProbe`.
    """

    n_live: int = 0
    dead_fraction: float = 0.0
    load_cv: float = 0.0
    load_max_over_mean: float = 0.0
    load_entropy_bits: float = 0.0
    overflow_fraction: float = 0.0
    effective_k: float = 0.0
    kept_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceSummary:
    """What one forward chose, or several: `effective_k` is summed over the `n_tokens` that have experts."""

    load_E: Tensor
    overflow: int = 0
    effective_k: float = 0.0
    n_tokens: int = 0

    def __add__(self, other: ChoiceSummary) -> ChoiceSummary:
        return ChoiceSummary(
            load_E=self.load_E + other.load_E,
            overflow=self.overflow + other.overflow,
            effective_k=self.effective_k + other.effective_k,
            n_tokens=self.n_tokens + other.n_tokens,
        )

    @property
    def mean_effective_k(self) -> float:
        """The effective experts of a token, on average; 0 without tokens."""
        return self.effective_k / max(1, self.n_tokens)


@torch.no_grad()
def effective_experts(weights_TK: Tensor) -> tuple[float, int]:
    """Effective experts summed over the tokens that have any, and how many tokens these are."""
    squares_T = weights_TK.square().sum(1)
    of_tokens_N = squares_T[squares_T > 0].reciprocal()
    return float(of_tokens_N.sum()), len(of_tokens_N)


class LoadWindow:
    """Accumulates loads in O(E) per step and memory: an exponential mean, and for each expert the steps it sat idle."""

    def __init__(self, n_experts: int, window_steps: int = WINDOW_STEPS) -> None:
        self._window_steps = window_steps
        self._n_steps = 0
        self._mean_load_E = torch.zeros(n_experts, dtype=torch.float64)
        self._mean_overflow = self._mean_effective_k = 0.0
        self._idle_steps_E = torch.zeros(n_experts, dtype=torch.int64)
        self._live_E = torch.ones(n_experts, dtype=torch.bool)

    def observe(self, chosen: ChoiceSummary, live_E: Tensor | None = None) -> None:
        """Count one step. An expert that is not live does not grow idle: it had no chance."""
        load_E = chosen.load_E.detach().cpu()
        self._live_E = torch.ones_like(self._live_E) if live_E is None else live_E.cpu().clone()
        self._n_steps += 1
        # The first steps weigh evenly; from then on the oldest fade.
        share = 1.0 / min(self._n_steps, self._window_steps)
        self._mean_load_E.lerp_(load_E.double(), share)
        self._mean_overflow += (chosen.overflow - self._mean_overflow) * share
        self._mean_effective_k += (chosen.mean_effective_k - self._mean_effective_k) * share
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
            effective_k=self._mean_effective_k,
        )
