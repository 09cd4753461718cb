"""A block: one replica of a contiguous range of experts, stacked. Owned by the runtime's thread.

Shapes: E experts of the block, G touched experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from node.model.devices import knows_float64
from node.model.experts.adam import AdamState, adam_step, clip_per_expert, zero_state
from node.model.experts.kinds import ExpertKind, expert_kind
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from node.model.experts.tiles import Chosen
    from protocol.manifest import BlockId, Manifest, OptimizerConfig


@dataclass
class Block:
    """Weights, moments and counters of one block. `version` counts optimizer steps that touched any of its experts.

    `learnt_E` (float64): tokens that each expert has learnt from here; averaging weighs replicas by them.
    """

    id: BlockId
    experts: range
    kind: ExpertKind
    params: dict[str, torch.Tensor]
    adam: AdamState
    learnt_E: torch.Tensor
    version: int = 0
    skipped_steps: int = field(default=0)
    """Expert steps not taken because their gradient was not finite."""

    @torch.no_grad()
    def step(self, gradients: BlockGradients, lr: float, config: OptimizerConfig) -> None:
        """Clip and apply; an expert whose gradient is not finite keeps its weights, and is counted."""
        finite_G = clip_per_expert(gradients.weights, config.expert_grad_clip)
        touched_G, weights, tokens_G = gradients.touched_G, gradients.weights, gradients.tokens_G
        if not bool(finite_G.all()):
            self.skipped_steps += int((~finite_G).sum())
            touched_G, tokens_G = touched_G[finite_G], tokens_G[finite_G]
            weights = {name: g[finite_G] for name, g in weights.items()}
        if len(touched_G):
            adam_step(self.params, self.adam, weights, touched_G, lr, config)
            learnt_E = self.learnt_E
            learnt_E.index_add_(0, touched_G.to(learnt_E.device), tokens_G.to(learnt_E))
            self.version += 1

    @torch.no_grad()
    def replace(self, row: int, weights: dict[str, torch.Tensor], version: int) -> None:
        """Another expert in the place of the one at `row`, its moments restarted.

        The block's version goes beyond `version` and its own: what was true of either is not of the block any more.
        """
        for name, weight in weights.items():
            self.params[name][row].copy_(weight)
            self.adam.first[name][row].zero_()
            self.adam.second[name][row].zero_()
        self.adam.steps_E[row] = 0
        self.version = max(self.version, version) + 1

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return sum(p[0].numel() for p in self.params.values())

    def gathered(self, experts_G: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights of some experts, stacked in their order: copies."""
        return {name: p.index_select(0, experts_G) for name, p in self.params.items()}


@dataclass(frozen=True)
class BlockGradients:
    """Gradients of a block's parameters: `weights` [G, ...] belong to experts `touched_G`, of `tokens_G` tokens.

    The touched experts are in rising order.
    """

    weights: dict[str, torch.Tensor]
    touched_G: torch.Tensor
    tokens_G: torch.Tensor

    @classmethod
    def empty(cls, block: Block, chosen: Chosen) -> BlockGradients:
        """Room for the gradients of the experts that were chosen."""
        device = next(iter(block.params.values())).device
        touched_G, tokens_G = (torch.from_numpy(a).to(device) for a in (chosen.experts_N, chosen.counts_N))
        weights = {name: p.new_empty(len(touched_G), *p.shape[1:]) for name, p in block.params.items()}
        return cls(weights=weights, touched_G=touched_G, tokens_G=tokens_G)

    def take(self, experts_G: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        """Write the gradients of some of the experts, in their order, to their places."""
        places_G = torch.searchsorted(self.touched_G, experts_G)
        for name, gradient in weights.items():
            self.weights[name].index_copy_(0, places_G, gradient)


def new_block(manifest: Manifest, block_id: BlockId, device: torch.device) -> Block:
    """Block as it is before any training: the same on every peer, from the run's seed and the block's place."""
    model = manifest.model
    kind = expert_kind(model.expert_kind)
    experts = model.block_experts(block_id.block)
    text = f"{manifest.seed}/{block_id.layer}/{block_id.block}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
    std = kind.init_std(model)
    params = {
        name: torch.randn(len(experts), *shape, generator=generator, dtype=torch.float32)
        .mul_(std[name])
        .to(device=device, dtype=DTYPES[manifest.dtype])
        for name, shape in kind.shapes(model).items()
    }
    counting = device if knows_float64(device) else torch.device("cpu")
    learnt_E = torch.zeros(len(experts), dtype=torch.float64, device=counting)
    return Block(id=block_id, experts=experts, kind=kind, params=params, adam=zero_state(params), learnt_E=learnt_E)
