"""Rotary position embedding (arXiv 2104.09864), for attention. Path of a step: data -> **transformer** -> gate."""

# Shapes: B sequences, A attention heads, T positions, C channels of a head.

from __future__ import annotations

import torch
from torch import Tensor

ROPE_BASE = 10_000.0


def rope_rotation(n_positions: int, n_channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864), each [n_positions, n_channels / 2].

    They are made per forward, not kept: they cost microseconds, and a buffer would be one more thing that `.to(dtype)`
    rounds. Angles are taken in float64 and only then rounded to the dtype of `like`.
    """
    half = n_channels // 2
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_TC = torch.arange(n_positions, dtype=torch.float64)[:, None] * frequency
    return angle_TC.cos().to(like), angle_TC.sin().to(like)


def rotate(x_BATC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (channel c, channel c + C/2) by its position's angle; shape and dtype stay."""
    cos_TC, sin_TC = rotation
    first, second = x_BATC.chunk(2, dim=-1)
    return torch.cat((first * cos_TC - second * sin_TC, first * sin_TC + second * cos_TC), dim=-1)
