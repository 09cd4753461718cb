"""Which expert each token goes to, and what comes back: what gate, dispatch, hosts and experts pass to each other.

Shapes: T tokens, K experts per token, P pairs (those of T x K that name an expert), D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

NO_EXPERT = -1
"""Stands in place of an expert's index where a token has none."""


class Pairs(NamedTuple):
    """Which expert of the layer each token goes to, and the weight of its output in the token's sum."""

    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor

    def to(self, device: torch.device) -> Pairs:
        """Return the pairs on `device`."""
        return Pairs(*(t.to(device) for t in self))


@dataclass(frozen=True)
class Inputs:
    """Tokens and pairs of one request."""

    x_TD: torch.Tensor
    pairs: Pairs

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.x_TD, *self.pairs))


@dataclass(frozen=True)
class Combined:
    """`combined_TD` sums what answered, `answered_TK` says which choices that were; `ticket` is for the backward."""

    combined_TD: torch.Tensor
    answered_TK: torch.Tensor
    ticket: Any


def flat_pairs(expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """Positions (int64, ascending) in the flattened [T, K] choice that name an expert."""
    return torch.nonzero(expert_ids_TK.reshape(-1) != NO_EXPERT)[:, 0]
