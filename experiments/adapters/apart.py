"""Adapters that were trained apart, put together without training: their mean, or a choice for each token.

Arrow (arXiv 2405.11157) needs nothing but the adapters: each one's prototype is the direction of its input that it
amplifies most, and a token goes to the adapters whose prototypes it points along, whichever way.

Shapes: T tokens, N tokens, E adapters, K of them for a token, D model width, R rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from node.model.gate import Gate
from node.model.moe import LocalExperts, MoE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.adapters.adapting import Adapters
    from experiments.adapters.seed import Seed
    from node.model.pretrained import PretrainedTrunk
    from protocol.manifest import ModelConfig


class Whole(nn.Module):
    """An adapter of any rank that no gate chooses: x W."""

    def __init__(self, weight_DD: torch.Tensor) -> None:
        super().__init__()
        self.weight_DD = weight_DD

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_ND -> [N, D]."""
        return x_ND @ self.weight_DD


def seed_alone(seed: Seed) -> PretrainedTrunk:
    """The seed with adapters that add nothing."""
    width = seed.manifest.model.d_model
    return seed.trunk([Whole(torch.zeros(width, width)) for _ in seed.layers])


def products(adapters: Adapters) -> list[torch.Tensor]:
    """What the only adapter of each layer does to its input, A B [D, D]."""
    return [own["w_in"][0] @ own["w_out"][0] for own in adapters.weights()]


def merged(seed: Seed, alone: Sequence[Adapters]) -> PretrainedTrunk:
    """The seed with the mean of the adapters' products in each layer, an adapter of the sum of their ranks."""
    layers = zip(*map(products, alone), strict=True)
    return seed.trunk([Whole(torch.stack(own).mean(0)) for own in layers])


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


def arrow(seed: Seed, alone: Sequence[Adapters], per_token: int) -> PretrainedTrunk:
    """The seed with all adapters as the experts of one grid, in their order, and gates that were never trained."""
    experts = together(alone)
    model = replace(experts.manifest.model, experts_per_token=per_token)
    found = []
    for layer, (block,) in experts.blocks.items():
        gate = ArrowGate(model, prototypes(block.params["w_in"], block.params["w_out"]))
        found.append(MoE(gate, experts, layer))
    return seed.trunk(found)


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
