"""Forward and backward of one layer's hosted blocks over (token, expert, weight) pairs: dispatch inside a host.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from protocol.errors import NotHostedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from node.experts.block import Block, BlockGradients


class Pairs(NamedTuple):
    """Which expert of the layer each token goes to, and the weight of its output in the token's sum."""

    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same pairs on `device`."""
        return Pairs(*(t.to(device) for t in self))


class _Slice(NamedTuple):
    """The sorted pairs of one block."""

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
    for block, rows, expert_P in _slices(blocks, pairs.expert_P[order_P]):
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
    for block, rows, expert_P in _slices(blocks, pairs.expert_P[order_P]):
        gradients = block.backward(x_TD[token_P[rows]], expert_P, grad_TD[token_P[rows]], weight_P[rows])
        grad_x_TD.index_add_(0, token_P[rows], gradients.inputs_PD)
        grad_weight_P[order_P[rows]] = gradients.weight_P
        on_block(block, gradients)
    return LayerGradients(tokens_TD=grad_x_TD, weight_P=grad_weight_P)


def _slices(blocks: Sequence[Block], sorted_expert_P: torch.Tensor) -> Iterator[_Slice]:
    if not blocks:
        return
    bounds = torch.tensor(
        [(block.experts.start, block.experts.stop) for block in blocks], device=sorted_expert_P.device
    )
    edges = torch.searchsorted(sorted_expert_P, bounds.reshape(-1)).view(-1, 2).tolist()
    for block, (start, stop) in zip(blocks, edges, strict=True):
        if stop > start:
            rows = slice(start, stop)
            yield _Slice(block, rows, sorted_expert_P[rows] - block.experts.start)
