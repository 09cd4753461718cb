"""Adapters that were trained apart, put together without training: their mean, or a choice for each token.

Arrow (arXiv 2405.11157) needs nothing but the adapters: each one's prototype is the direction of its input that it
amplifies most, and a token goes to the adapters whose prototypes it points along, whichever way.

Shapes: T tokens, N tokens, E adapters, K of them for a token, D model width, R rank, S = E * R.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from node.model.gate import Gate
from node.model.moe import LocalExperts, MoE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.adapters.seed.adapting import Adapters
    from protocol.manifest import ModelConfig


class Product(nn.Module):
    """One adapter that no gate chooses: x A B."""

    def __init__(self, a_DR: torch.Tensor, b_RD: torch.Tensor) -> None:
        super().__init__()
        self.a_DR, self.b_RD = a_DR, b_RD

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_ND -> [N, D]."""
        return x_ND @ self.a_DR @ self.b_RD


def merged(alone: Sequence[Adapters]) -> dict[int, Product]:
    """The mean of the adapters' products for each layer, which is an adapter of the sum of their ranks."""
    found = {}
    for layer in alone[0].layers:
        weights = [adapters.weights(layer) for adapters in alone]
        a_DS = torch.cat([own["w_in"][0] for own in weights], 1)
        found[layer] = Product(a_DS, torch.cat([own["w_out"][0] for own in weights]) / len(alone))
    return found


def products(adapters: Adapters) -> dict[str, torch.Tensor]:
    """What one adapter of each layer does to its input, A B [D, D], named as a model's tensors are."""
    weights = {layer: adapters.weights(layer) for layer in adapters.layers}
    return {f"layers.{layer}": own["w_in"][0] @ own["w_out"][0] for layer, own in weights.items()}


class Whole(nn.Module):
    """An adapter of any rank: x W."""

    def __init__(self, weight_DD: torch.Tensor) -> None:
        super().__init__()
        self.weight_DD = weight_DD

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_ND -> [N, D]."""
        return x_ND @ self.weight_DD


def from_products(weights: Mapping[str, torch.Tensor]) -> dict[int, Whole]:
    """Adapters by layer, of such products or what was made of them."""
    return {int(name.rpartition(".")[2]): Whole(weight_DD) for name, weight_DD in weights.items()}


class ArrowGate(Gate):
    """Chooses by prototypes [E, D] alone; weights are the softmax of how far a token points along the best K."""

    def __init__(self, model: ModelConfig, prototypes_ED: torch.Tensor) -> None:
        super().__init__(model)
        self.register_buffer("prototypes_ED", prototypes_ED)
        self.prototypes_ED: torch.Tensor

    def choose(self, x_TD: torch.Tensor, live_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002 - all are live here
        """Choose K experts for each token; see `Gate.choose`."""
        best = (x_TD @ self.prototypes_ED.T).abs().topk(self.experts_per_token, dim=1)
        # Logits whose sigmoids are the softmax, which sums to 1 and so stays as it is when the gate normalises it.
        return best.indices, torch.logit(torch.softmax(best.values, 1), eps=torch.finfo(x_TD.dtype).eps)


def arrow(alone: Sequence[Adapters], per_token: int) -> dict[int, MoE]:
    """All adapters as the experts of one grid, in their order, and a gate for each layer that was never trained."""
    experts = together(alone)
    model = replace(experts.manifest.model, experts_per_token=per_token)
    found = {}
    for number, layer in enumerate(alone[0].layers):
        params = experts.blocks[number][0].params
        found[layer] = MoE(ArrowGate(model, prototypes(params["w_in"], params["w_out"])), experts, number)
    return found


def together(alone: Sequence[Adapters]) -> LocalExperts:
    """A grid whose expert i of each layer is the only one of `alone[i]`."""
    manifest = alone[0].manifest
    model = replace(manifest.model, experts_per_layer=len(alone), experts_per_block=len(alone))
    experts = LocalExperts(replace(manifest, model=model))
    for layer, (block,) in experts.blocks.items():
        for name, stacked in block.params.items():
            stacked.copy_(torch.cat([own.experts.blocks[layer][0].params[name] for own in alone]))
    return experts


def prototypes(a_EDR: torch.Tensor, b_ERD: torch.Tensor) -> torch.Tensor:
    """First left singular vector of each product A B [D, D], [E, D], by way of matrices no larger than the rank."""
    found = []
    for a_DR, b_RD in zip(a_EDR, b_ERD, strict=True):
        q_DR, r_RR = torch.linalg.qr(a_DR)
        found.append(q_DR @ torch.linalg.svd(r_RR @ b_RD, full_matrices=False).U[:, 0])
    return torch.stack(found)
