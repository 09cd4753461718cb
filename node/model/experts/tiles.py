"""Tiles: experts with about equally many pairs, so that a few batched products do for all of a block.

A product for each expert costs microseconds of overhead, most of the time where thousands of experts get a few rows
each. Sorted by their number of pairs, experts can be padded to equally many rows with little waste (as the tiles of
block-sparse products, arXiv 2211.15841); and the tiles are small, so that what one step of a layer leaves for the next
is still in the processor's cache.

Where the pairs are is worked out by numpy, whose calls on small arrays cost a fraction of torch's.
Shapes: P pairs sorted by expert, N experts that have pairs, G experts of a tile, R rows of each, X = G * R.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from node.model.experts.block import Block

CACHE_VALUES, DEVICE_VALUES = 2**18, 2**24
"""Weights, or inputs if they are more, of a tile: on a processor, and on a device, whose calls cost more than its
memory."""

PADDED_PART = 4
"""A tile's experts may be padded by a fourth of its rows."""

FREE_VALUES = 2**19
"""Padding that costs less than another tile would: rows times the weights that each is multiplied with."""


class Tile(NamedTuple):
    """Some experts of a block and the pairs of each, as many for all: the last are repeated to fill up.

    `pair_X` are their places among the sorted pairs; `is_real_GR` is False for repetitions, whose weight is nothing.
    An expert is padded with pairs of its own, so that no other token meets what it makes of its tokens.
    """

    experts_G: torch.Tensor
    pair_X: torch.Tensor
    is_real_GR: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Experts and rows."""
        return self.is_real_GR.shape[0], self.is_real_GR.shape[1]


class Chosen(NamedTuple):
    """Experts that have pairs, rising; how many each has, and where they start among the pairs sorted by expert."""

    experts_N: NDArray[np.int64]
    counts_N: NDArray[np.int64]
    starts_N: NDArray[np.int64]

    @classmethod
    def of(cls, expert_P: torch.Tensor) -> Chosen:
        """Find the experts of pairs that are sorted by expert."""
        experts_N, counts_N = (t.cpu().numpy() for t in torch.unique_consecutive(expert_P, return_counts=True))
        return cls(experts_N, counts_N, counts_N.cumsum() - counts_N)

    def of_blocks(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Chosen]]:
        """Take what each block holds, its experts counted from its first; a block without any is left out."""
        bounds = np.searchsorted(self.experts_N, [(block.experts.start, block.experts.stop) for block in blocks])
        for block, (start, stop) in zip(blocks, bounds.tolist(), strict=True):
            if start < stop:
                own = slice(start, stop)
                yield block, Chosen(self.experts_N[own] - block.experts.start, self.counts_N[own], self.starts_N[own])

    def tiles(self, expert_values: int, width: int, device: torch.device) -> Iterator[Tile]:
        """Cut them into tiles; an expert has `expert_values` weights, and a pair's input has `width` values."""
        order_N = np.argsort(-self.counts_N, kind="stable")
        counts_N, starts_N, experts_N = self.counts_N[order_N], self.starts_N[order_N], self.experts_N[order_N]
        at_once = CACHE_VALUES if device.type == "cpu" else DEVICE_VALUES
        for start, stop, n_rows in _cut(counts_N.tolist(), expert_values, width, at_once):
            row_R, counts_G1 = np.arange(n_rows), counts_N[start:stop, None]
            pair_GR = starts_N[start:stop, None] + np.minimum(row_R, counts_G1 - 1)
            arrays = (experts_N[start:stop], pair_GR.ravel(), row_R < counts_G1)
            yield Tile(*(torch.from_numpy(array).to(device) for array in arrays))


def _cut(counts: list[int], expert_values: int, width: int, at_once: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and rows of tiles of experts whose `counts` fall."""
    start, n = 0, len(counts)
    while start < n:
        rows = counts[start]
        most = max(1, at_once // max(expert_values, rows * width))
        stop = min(n, start + most)
        free = FREE_VALUES // (expert_values * (stop - start))
        fewest = rows - max(rows // PADDED_PART, free)
        # Counts fall, so that their negatives rise: the first that has fewer rows than `fewest`.
        stop = bisect_right(counts, -fewest, start, stop, key=int.__neg__)
        yield start, stop, rows
        start = stop
