"""The grouped product: many experts' matrix products in one call. Innermost step of a host's forward and backward.

Shapes: P pairs sorted by group, G groups, N inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_product(x_PN: torch.Tensor, w_GNM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Rows of group g (up to `ends_G[g]`, int32, exclusive) times `w_GNM[g]`: [P, M]. Differentiable in x and w."""
    if _fast(x_PN, w_GNM):
        return functional.grouped_mm(x_PN, w_GNM, offs=ends_G)
    return _looped_product(x_PN, w_GNM, ends_G)


def _fast(x_PN: torch.Tensor, w_GNM: torch.Tensor) -> bool:
    # grouped_mm knows no float64 and wants rows that start at multiples of 16 bytes.
    row_bytes = (x_PN.shape[1] * x_PN.element_size(), w_GNM.shape[2] * w_GNM.element_size())
    return (
        hasattr(functional, "grouped_mm")
        and x_PN.dtype in _FAST_DTYPES
        and not any(size % _ALIGNMENT_BYTES for size in row_bytes)
    )


def _looped_product(x_PN: torch.Tensor, w_GNM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    counts = torch.diff(ends_G, prepend=ends_G.new_zeros(1)).tolist()
    parts = [rows @ w_NM for rows, w_NM in zip(x_PN.split(counts), w_GNM.unbind(0), strict=True)]
    return torch.cat(parts) if parts else x_PN.new_zeros(0, w_GNM.shape[2])
