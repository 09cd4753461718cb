"""Merges of models that began from one base and were trained apart: tensors in, tensors out, nothing is measured here.

What a participant learnt is its task vector, its weights less the base's (arXiv 2212.04089).
"""

# Shapes: S participants, G groups of tensors, W all values of a model in one row.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    Weights = Mapping[str, Tensor]


def average(participants: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The mean, or one weighted by `shares`, which need not add up to 1. Raises InvalidInputError for shares unfit."""
    _check_alike(participants)
    shares_S = torch.ones(len(participants)) if shares is None else torch.tensor(shares, dtype=torch.float32)
    if len(shares_S) != len(participants) or bool((shares_S < 0).any()) or not 0.0 < float(shares_S.sum()) < torch.inf:
        raise InvalidInputError("shares", f"are {shares}; it takes one of 0 or more for each participant, not all 0")
    shares_S /= shares_S.sum()
    return {name: _combined(shares_S, [p[name] for p in participants]) for name in participants[0]}


def task_arithmetic(base: Weights, participants: Sequence[Weights], scale: float) -> dict[str, Tensor]:
    """The base and `scale` times the sum of the task vectors; a scale of 1 / S gives the mean."""
    return by_group(base, participants, dict.fromkeys(groups(base), [scale] * len(participants)))


def by_group(
    base: Weights, participants: Sequence[Weights], shares: Mapping[str, Sequence[float]]
) -> dict[str, Tensor]:
    """The base and, in each group of tensors, the task vectors times that group's shares, one for each participant."""
    _check_alike([base, *participants])
    merged = {}
    for name, tensor in base.items():
        shares_S = torch.tensor(shares[group_of(name)], dtype=tensor.dtype)
        merged[name] = tensor + _combined(shares_S, [p[name] - tensor for p in participants])
    return merged


def ties(base: Weights, participants: Sequence[Weights], density: float, scale: float) -> dict[str, Tensor]:
    """Trim, elect a sign, merge (arXiv 2306.01708).

    Of each task vector the part `density` of its values that is largest is kept. In each place the sign with more mass
    wins; the mean of the values of that sign, times `scale`, is added to the base.
    """
    _check_alike([base, *participants])
    if not 0.0 < density <= 1.0:
        raise InvalidInputError("density", f"is {density:g}; it is more than 0 and at most 1")
    base_W = row_of(base)
    trimmed_SW = torch.stack([trimmed(row_of(p) - base_W, density) for p in participants])
    elected_W = trimmed_SW.sum(0).sign()
    agrees_SW = (trimmed_SW.sign() == elected_W) & (trimmed_SW != 0.0)
    sum_W = torch.where(agrees_SW, trimmed_SW, 0.0).sum(0)
    return _unrow(base_W + scale * sum_W / agrees_SW.sum(0).clamp(min=1), base)


def trimmed(vector_W: Tensor, density: float) -> Tensor:
    """Set all values to zero but the share `density` of them, at least one, that is largest in magnitude."""
    kept = max(1, round(density * len(vector_W)))
    least = vector_W.abs().topk(kept).values[-1]
    return torch.where(vector_W.abs() >= least, vector_W, 0.0)


def groups(weights: Iterable[str]) -> list[str]:
    """Return the groups of a model's tensors, in their order."""
    return list(dict.fromkeys(group_of(name) for name in weights))


def group_of(name: str) -> str:
    """Group of a tensor: its layer, or the embedding, or the head with the norm before it."""
    first, *rest = name.split(".")
    if first == "layers" and rest:
        return f"layer {rest[0]}"
    return "embedding" if first.startswith("embedding") else "head"


def row_of(weights: Weights) -> Tensor:
    """All values of a model in one row [W]."""
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def _combined(shares_S: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return torch.einsum("s,s...->...", shares_S.to(tensors[0]), torch.stack(list(tensors)))


def _unrow(row_W: Tensor, like: Weights) -> dict[str, Tensor]:
    parts = row_W.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _check_alike(models: Sequence[Weights]) -> None:
    shapes = [[(name, tensor.shape) for name, tensor in model.items()] for model in models]
    if not shapes or any(other != shapes[0] for other in shapes[1:]):
        raise InvalidInputError("participants", "are not models of one shape, or there is none: they cannot be merged")
