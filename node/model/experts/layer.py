"""Forward and backward of one layer's hosted blocks over (token, expert, weight) pairs: dispatch inside a host.

Shapes: T tokens, P pairs, B blocks, D model width, G experts of a tile, R rows of each, X = G * R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import NotHostedError
from node.model.experts.block import BlockGradients
from node.model.experts.tiles import Chosen
from node.model.pairs import Pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from node.model.experts.block import Block
    from node.model.experts.tiles import Tile


@dataclass(frozen=True)
class LayerGradients:
    """`tokens_TD`, and one number per pair."""

    tokens_TD: torch.Tensor
    weight_P: torch.Tensor


def check_hosted(blocks: Sequence[Block], expert_P: torch.Tensor, layer: int) -> None:
    """Raise NotHostedError for the first expert that none of `blocks` (one layer's, sorted) holds."""
    chosen_P = expert_P.numpy()
    starts_B, stops_B = np.array([(block.experts.start, block.experts.stop) for block in blocks]).reshape(-1, 2).T
    # An expert is in the last block that does not start after it, or in none; before the first block is none.
    before_P = np.searchsorted(starts_B, chosen_P, side="right")
    missing_P = chosen_P >= np.concatenate(([0], stops_B))[before_P]
    if missing_P.any():
        missing = int(chosen_P[missing_P.argmax()])
        raise NotHostedError("inputs.pairs.expert_P", f"expert {missing} of layer {layer} is not hosted here")


@torch.no_grad()
def layer_forward(blocks: Sequence[Block], x_TD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Combine: for each token the weighted sum [T, D] of its experts' outputs."""
    y_TD, by_expert = torch.zeros_like(x_TD), _Sorted.of(pairs)
    for block, own in by_expert.of_blocks(blocks):
        for tile in own.tiles(block.expert_values, x_TD.shape[1], x_TD.device):
            token_X, weight_GR = by_expert.tokens_and_weights(tile)
            y_GRD = block.kind.apply(block.gathered(tile.experts_G), _rows(x_TD, token_X, tile))
            y_TD.index_add_(0, token_X, y_GRD.mul_(weight_GR[:, :, None]).flatten(0, 1))
    return y_TD


@torch.no_grad()
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
    found = LayerGradients(tokens_TD=torch.zeros_like(x_TD), weight_P=torch.zeros_like(pairs.weight_P))
    by_expert = _Sorted.of(pairs)
    for block, own in by_expert.of_blocks(blocks):
        gradients = BlockGradients.empty(block, own)
        for tile in own.tiles(block.expert_values, x_TD.shape[1], x_TD.device):
            token_X, weight_GR = by_expert.tokens_and_weights(tile)
            x_GRD, grad_GRD = (_rows(of_TD, token_X, tile) for of_TD in (x_TD, grad_TD))
            of_tile = block.kind.differentiate(block.gathered(tile.experts_G), x_GRD, grad_GRD, weight_GR)
            found.tokens_TD.index_add_(0, token_X, of_tile.inputs_GRD.flatten(0, 1))
            # A repeated pair's gradient is the same at each of its places.
            found.weight_P.index_copy_(0, by_expert.places(tile), of_tile.weight_GR.flatten())
            gradients.take(tile.experts_G, of_tile.params)
        on_block(block, gradients)
    return found


@dataclass(frozen=True)
class _Sorted:
    """A layer's pairs sorted by expert, and their places in the order in which they came."""

    pairs: Pairs
    place_P: torch.Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> _Sorted:
        expert_P, place_P = torch.sort(pairs.expert_P, stable=True)
        return cls(Pairs(pairs.token_P[place_P], expert_P, pairs.weight_P[place_P]), place_P)

    def of_blocks(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Chosen]]:
        return Chosen.of(self.pairs.expert_P).of_blocks(blocks)

    def tokens_and_weights(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        weight_GR = self.pairs.weight_P.index_select(0, tile.pair_X).view(tile.shape) * tile.is_real_GR
        return self.pairs.token_P.index_select(0, tile.pair_X), weight_GR

    def places(self, tile: Tile) -> torch.Tensor:
        return self.place_P.index_select(0, tile.pair_X)


def _rows(of_TD: torch.Tensor, token_X: torch.Tensor, tile: Tile) -> torch.Tensor:
    # index_select takes a tenth of the time of of_TD[token_X] on a processor.
    return of_TD.index_select(0, token_X).view(*tile.shape, -1)
