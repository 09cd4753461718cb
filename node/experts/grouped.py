"""The grouped product: many experts' matrix products in one call. Innermost step of a host's forward and backward.

Shapes: P pairs sorted by group, Q of one group, G groups, N inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_product(x_PN: torch.Tensor, w_GNM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Rows of group g (up to `ends_G[g]`, int32, exclusive) times `w_GNM[g]`: [P, M]."""
    if _fast(x_PN.dtype, x_PN.shape[1], w_GNM.shape[2]):
        return functional.grouped_mm(x_PN, w_GNM, offs=ends_G)
    pairs = zip(x_PN.split(_counts(ends_G)), w_GNM.unbind(0), strict=True)
    parts = [rows_QN @ w_NM for rows_QN, w_NM in pairs]
    return torch.cat(parts) if parts else x_PN.new_zeros(0, w_GNM.shape[2])


def grouped_outer(x_PN: torch.Tensor, y_PM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Sum of the outer products of each group's rows: [G, N, M], zero for a group without rows."""
    if _fast(x_PN.dtype, x_PN.shape[1], y_PM.shape[1]):
        return functional.grouped_mm(x_PN.mT, y_PM, offs=ends_G)
    counts = _counts(ends_G)
    parts = [rows_QN.mT @ rows_QM for rows_QN, rows_QM in zip(x_PN.split(counts), y_PM.split(counts), strict=True)]
    return torch.stack(parts) if parts else x_PN.new_zeros(0, x_PN.shape[1], y_PM.shape[1])


def _fast(dtype: torch.dtype, *widths: int) -> bool:
    # grouped_mm knows no float64 and wants rows that start at multiples of 16 bytes.
    aligned = not any(width * dtype.itemsize % _ALIGNMENT_BYTES for width in widths)
    return hasattr(functional, "grouped_mm") and dtype in _FAST_DTYPES and aligned


def _counts(ends_G: torch.Tensor) -> list[int]:
    return torch.diff(ends_G, prepend=ends_G.new_zeros(1)).tolist()
