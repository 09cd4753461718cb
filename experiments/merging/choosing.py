"""A window predicted by several models that were trained apart: by all, weighted, or by one that is chosen for it.

Shapes: P models, N windows, T positions. Log probabilities are those that each model gave to the byte that came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from experiments.apart.ensemble import by_posterior

if TYPE_CHECKING:
    from torch import Tensor

PREFIX: int = 32


def by_prefix(log_p_PNT: Tensor, prefix: int = PREFIX) -> Tensor:
    """Nats per byte [N]: the mixture by the posterior for `prefix` bytes, then the one that was likeliest on these."""
    n_positions = log_p_PNT.shape[2]
    prefix = min(prefix, n_positions)
    chosen_N = log_p_PNT[:, :, :prefix].sum(2).argmax(0)
    rest_N = -by_index(log_p_PNT[:, :, prefix:].sum(2), chosen_N)
    return (by_posterior(log_p_PNT[:, :, :prefix]) * prefix + rest_N) / n_positions


def models_by_prefix(n_models: int, n_positions: int, prefix: int = PREFIX) -> float:
    """Models that are run for a byte, on average."""
    prefix = min(prefix, n_positions)
    return (n_models * prefix + n_positions - prefix) / n_positions


def by_topic(log_p_PNT: Tensor, model_N: Tensor) -> Tensor:
    """Nats per byte [N] where somebody says whose window it is."""
    return -by_index(log_p_PNT.mean(2), model_N)


def in_hindsight(log_p_PNT: Tensor) -> Tensor:
    """Nats per byte [N] of whichever model was best on the window: no choice of one model can do better."""
    return -log_p_PNT.mean(2).amax(0)


def by_index(value_PN: Tensor, index_N: Tensor) -> Tensor:
    """Return from each column the value that `index_N` asks for."""
    return value_PN[index_N, torch.arange(value_PN.shape[1])]
