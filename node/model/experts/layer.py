"""Forward and backward of one layer's hosted blocks over (token, expert, weight) pairs: dispatch inside a host.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.errors import NotHostedError
from node.model.experts.block import BlockGradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from node.model.experts.block import Block
    from node.model.pairs import Pairs

VALUES_AT_ONCE = 2**22
"""Inputs of pairs (P * D) that are worked on at once: larger ones leave the cache, and want new memory each time."""


class _Slice(NamedTuple):
    """Sorted pairs of one block: all pairs of some of its experts."""

    block: Block
    rows: slice
    expert_P: torch.Tensor


@dataclass(frozen=True)
class LayerGradients:
    """`tokens_TD`, and one number per pair."""

    tokens_TD: torch.Tensor
    weight_P: torch.Tensor


def check_hosted(blocks: Sequence[Block], expert_P: torch.Tensor, layer: int) -> None:
    """Raise NotHostedError for the first expert that none of `blocks` (one layer's, sorted) holds."""
    hosted = torch.zeros_like(expert_P, dtype=torch.bool)
    for block in blocks:
        hosted |= (expert_P >= block.experts.start) & (expert_P < block.experts.stop)
    if not bool(hosted.all()):
        missing = int(expert_P[~hosted][0])
        raise NotHostedError("inputs.pairs.expert_P", f"expert {missing} of layer {layer} is not hosted here")


def layer_forward(blocks: Sequence[Block], x_TD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Combine: for each token the weighted sum [T, D] of its experts' outputs."""
    order_P = torch.argsort(pairs.expert_P, stable=True)
    token_P, weight_P = pairs.token_P[order_P], pairs.weight_P[order_P]
    y_TD = torch.zeros_like(x_TD)
    for block, rows, expert_P in _slices(blocks, pairs.expert_P[order_P], x_TD.shape[1]):
        y_PD = block.forward(x_TD[token_P[rows]], expert_P)
        y_TD.index_add_(0, token_P[rows], y_PD.mul_(weight_P[rows, None]))
    return y_TD


def layer_backward(
    blocks: Sequence[Block],
    x_TD: torch.Tensor,
    pairs: Pairs,
    grad_TD: torch.Tensor,
    on_block: Callable[[Block, BlockGradients], None],
) -> LayerGradients:
    """Gradients of `sum(grad_TD * layer_forward(...))`.

    `on_block` gets each touched block's as soon as they are known, to step it or to let them go: a layer's weight
    gradients are never held all at once.
    """
    order_P = torch.argsort(pairs.expert_P, stable=True)
    token_P, weight_P = pairs.token_P[order_P], pairs.weight_P[order_P]
    grad_x_TD = torch.zeros_like(x_TD)
    grad_weight_P = torch.zeros_like(pairs.weight_P)
    slices = _slices(blocks, pairs.expert_P[order_P], x_TD.shape[1])
    for block, of_block in itertools.groupby(slices, lambda part: part.block):
        parts = []
        for _, rows, expert_P in of_block:
            of_rows = block.backward(x_TD[token_P[rows]], expert_P, grad_TD[token_P[rows]], weight_P[rows])
            grad_x_TD.index_add_(0, token_P[rows], of_rows.inputs_PD)
            grad_weight_P[order_P[rows]] = of_rows.weight_P
            parts.append(of_rows.gradients)
        on_block(block, BlockGradients.join(parts))
    return LayerGradients(tokens_TD=grad_x_TD, weight_P=grad_weight_P)


def _slices(blocks: Sequence[Block], sorted_expert_P: torch.Tensor, d_model: int) -> Iterator[_Slice]:
    if not blocks:
        return
    bounds = torch.tensor(
        [(block.experts.start, block.experts.stop) for block in blocks], device=sorted_expert_P.device
    )
    edges = torch.searchsorted(sorted_expert_P, bounds.reshape(-1)).view(-1, 2).tolist()
    for block, (start, stop) in zip(blocks, edges, strict=True):
        for rows in _rows_at_once(sorted_expert_P, start, stop, max(1, VALUES_AT_ONCE // d_model)):
            yield _Slice(block, rows, sorted_expert_P[rows] - block.experts.start)


def _rows_at_once(sorted_expert_P: torch.Tensor, start: int, stop: int, n_rows: int) -> Iterator[slice]:
    """Rows `start` to `stop`, about `n_rows` at a time; those of one expert stay together."""
    if stop - start <= n_rows:
        cuts = [start, stop] if stop > start else []
    else:
        cut_experts = sorted_expert_P[start + n_rows : stop : n_rows].contiguous()
        cuts = sorted({start, stop, *torch.searchsorted(sorted_expert_P, cut_experts).tolist()})
    yield from itertools.starmap(slice, itertools.pairwise(cuts))
