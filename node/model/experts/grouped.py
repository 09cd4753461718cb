"""The grouped product: many experts' matrix products in few calls. Innermost step of a host's forward and backward.

`grouped_mm` takes about a microsecond for each group on a CPU: most of the time where groups have a row or two.
Groups with equally many rows are one batched product instead, without padding: that is why groups are put in order.

Shapes: P pairs sorted by group, Q of one group, G groups, R groups of a run, N inputs, M outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16

MAX_ROWS = 8
"""Groups with more rows than this are worth a product of their own."""

MIN_RUN = 4
"""A batched product of fewer groups would cost more than theirs."""


class Groups(NamedTuple):
    """Rows of each group: `runs` (rows, groups) of equally large groups come first, then all others.

    `rest_ends_G` (int32) are the ends of the others, counted from where the runs end.
    """

    counts_G: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    rest_ends_G: torch.Tensor

    @classmethod
    def of(cls, counts_G: torch.Tensor, runs: tuple[tuple[int, int], ...] = ()) -> Groups:
        """Make the groups that have `counts_G` rows, those of `runs` first."""
        rest_G = counts_G[sum(n for _, n in runs) :]
        return cls(counts_G, runs, rest_G.cumsum(0).to(torch.int32))

    @property
    def runs_end(self) -> tuple[int, int]:
        """Groups and pairs in runs."""
        return sum(n for _, n in self.runs), sum(rows * n for rows, n in self.runs)


def order_by_size(counts_G: torch.Tensor, n_pairs: int) -> tuple[torch.Tensor, Groups] | None:
    """An order (int64, of groups) that puts equally large groups side by side; None where there is nothing to gain.

    Groups with many rows on average are not looked at: there are hardly any runs among them.
    """
    if len(counts_G) < MIN_RUN or n_pairs > MAX_ROWS * len(counts_G):
        return None
    size_G = counts_G.clamp(max=MAX_ROWS + 1)
    n_groups = torch.bincount(size_G, minlength=MAX_ROWS + 2).tolist()
    runs = tuple((rows, n_groups[rows]) for rows in range(1, MAX_ROWS + 1) if n_groups[rows] >= MIN_RUN)
    if not runs:
        return None
    rank = torch.full((MAX_ROWS + 2,), MAX_ROWS + 1)
    rank[[rows for rows, _ in runs]] = torch.tensor([rows for rows, _ in runs])
    order_G = torch.argsort(rank.to(size_G.device)[size_G], stable=True)
    return order_G, Groups.of(counts_G[order_G], runs)


def grouped_product(x_PN: torch.Tensor, w_GNM: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rows of group g times `w_GNM[g]`: [P, M]."""
    if not groups.runs:
        return _product(x_PN, w_GNM, groups.rest_ends_G)
    y_PM = x_PN.new_empty(len(x_PN), w_GNM.shape[2])
    for pairs, of, rows in _runs(groups):
        shape = (of.stop - of.start, rows, -1)
        torch.bmm(x_PN[pairs].view(shape), w_GNM[of], out=y_PM[pairs].view(shape))
    n_groups, n_pairs = groups.runs_end
    if n_pairs < len(x_PN):
        y_PM[n_pairs:] = _product(x_PN[n_pairs:], w_GNM[n_groups:], groups.rest_ends_G)
    return y_PM


def grouped_outer(x_PN: torch.Tensor, y_PM: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum of the outer products of each group's rows: [G, N, M], zero for a group without rows."""
    if not groups.runs:
        return _outer(x_PN, y_PM, groups.rest_ends_G)
    w_GNM = x_PN.new_empty(len(groups.counts_G), x_PN.shape[1], y_PM.shape[1])
    for pairs, of, rows in _runs(groups):
        shape = (of.stop - of.start, rows, -1)
        torch.bmm(x_PN[pairs].view(shape).mT, y_PM[pairs].view(shape), out=w_GNM[of])
    n_groups, n_pairs = groups.runs_end
    if n_groups < len(w_GNM):
        w_GNM[n_groups:] = _outer(x_PN[n_pairs:], y_PM[n_pairs:], groups.rest_ends_G)
    return w_GNM


def _runs(groups: Groups) -> Iterator[tuple[slice, slice, int]]:
    """Pairs and groups of each run, and the rows of one of its groups."""
    pair = group = 0
    for rows, n in groups.runs:
        yield slice(pair, pair + rows * n), slice(group, group + n), rows
        pair, group = pair + rows * n, group + n


def _product(x_PN: torch.Tensor, w_GNM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    if _fast(x_PN, x_PN.shape[1], w_GNM.shape[2]):
        return functional.grouped_mm(x_PN, w_GNM, offs=ends_G)
    if 1 in w_GNM.shape[1:]:
        return _thin_product(x_PN, w_GNM, ends_G)
    pairs = zip(x_PN.split(_counts(ends_G)), w_GNM.unbind(0), strict=True)
    return torch.cat([rows_QN @ w_NM for rows_QN, w_NM in pairs])


def _thin_product(x_PN: torch.Tensor, w_GNM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Multiply for experts of a single neuron: thousands of groups of a few rows, without a matrix product."""
    w_PX = w_GNM.flatten(1).index_select(0, _group_of_pair(ends_G, len(x_PN)))
    if w_GNM.shape[2] == 1:
        y_P: torch.Tensor = torch.linalg.vecdot(x_PN, w_PX)
        return y_P[:, None]
    return w_PX.mul_(x_PN)


def _outer(x_PN: torch.Tensor, y_PM: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    if _fast(x_PN, x_PN.shape[1], y_PM.shape[1]):
        return functional.grouped_mm(x_PN.mT, y_PM, offs=ends_G)
    if 1 in {x_PN.shape[1], y_PM.shape[1]}:
        x_PX = x_PN * y_PM
        sum_GX = x_PX.new_zeros(len(ends_G), x_PX.shape[1])
        sum_GX.index_add_(0, _group_of_pair(ends_G, len(x_PN)), x_PX)
        return sum_GX.view(len(ends_G), x_PN.shape[1], y_PM.shape[1])
    counts = _counts(ends_G)
    pairs = zip(x_PN.split(counts), y_PM.split(counts), strict=True)
    return torch.stack([rows_QN.mT @ rows_QM for rows_QN, rows_QM in pairs])


def _group_of_pair(ends_G: torch.Tensor, n_pairs: int) -> torch.Tensor:
    return torch.searchsorted(ends_G, torch.arange(n_pairs, dtype=ends_G.dtype, device=ends_G.device), right=True)


def _counts(ends_G: torch.Tensor) -> list[int]:
    return torch.diff(ends_G, prepend=ends_G.new_zeros(1)).tolist()


def _fast(of: torch.Tensor, *widths: int) -> bool:
    # grouped_mm knows neither float64 nor Apple's GPUs, and wants rows that start at multiples of 16 bytes.
    aligned = not any(width * of.itemsize % _ALIGNMENT_BYTES for width in widths)
    known = of.dtype in _FAST_DTYPES and of.device.type != "mps"
    return hasattr(functional, "grouped_mm") and known and aligned
