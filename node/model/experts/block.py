"""A block: one replica of a contiguous range of experts, stacked. Owned by the runtime's thread.

Shapes: E experts of the block, P pairs sorted by expert, G touched experts, D model width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from node.model.devices import knows_float64
from node.model.experts.adam import SMALL_VALUES, AdamState, adam_step, clip_per_expert, is_all, zero_state
from node.model.experts.grouped import MAX_ROWS, Groups, order_by_size
from node.model.experts.kinds import ExpertKind, expert_kind
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    def forward(self, x_PD: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
        """Outputs [P, D] for pairs sorted by `expert_P` (int64, local to the block)."""
        if self._is_small and len(expert_P) <= MAX_ROWS * len(self.experts):
            touched = _touched(expert_P)
            return touched.unsort(self.kind.apply(self._gathered(touched), touched.sort(x_PD), touched.groups))
        # Copies of large weights would cost more than passing by those of experts without pairs.
        return self.kind.apply(self.params, x_PD, Groups.of(torch.bincount(expert_P, minlength=len(self.experts))))

    @torch.no_grad()
    def backward(
        self, x_PD: torch.Tensor, expert_P: torch.Tensor, grad_PD: torch.Tensor, weight_P: torch.Tensor
    ) -> BlockBackward:
        """Gradients of `sum(weight_P * (grad_PD * forward(...)).sum(1))`; those of weights for touched experts only."""
        touched = _touched(expert_P)
        x_PD, grad_PD, weight_P = touched.sort(x_PD), touched.sort(grad_PD), touched.sort(weight_P)
        gradients = self.kind.differentiate(self._gathered(touched), x_PD, touched.groups, grad_PD, weight_P)
        return BlockBackward(
            inputs_PD=touched.unsort(gradients.inputs_PD),
            weight_P=touched.unsort(gradients.weight_P),
            gradients=BlockGradients(
                weights=gradients.params, touched_G=touched.experts_G, tokens_G=touched.groups.counts_G
            ),
        )

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
    def _is_small(self) -> bool:
        return all(p[0].numel() < SMALL_VALUES for p in self.params.values())

    def _gathered(self, touched: _Touched) -> dict[str, torch.Tensor]:
        if is_all(touched.experts_G, len(self.experts)):
            return self.params
        return {name: p.index_select(0, touched.experts_G) for name, p in self.params.items()}


class _Touched(NamedTuple):
    """Experts that have pairs, in the order of `groups`; `order_P` brings pairs into it from that of their experts."""

    experts_G: torch.Tensor
    groups: Groups
    order_P: torch.Tensor | None

    def sort(self, of_P: torch.Tensor) -> torch.Tensor:
        """Sort the rows, one per pair, into the order of the groups."""
        return of_P if self.order_P is None else of_P.index_select(0, self.order_P)

    def unsort(self, of_P: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return of_P if self.order_P is None else torch.empty_like(of_P).index_copy_(0, self.order_P, of_P)


def _touched(expert_P: torch.Tensor) -> _Touched:
    experts_G, counts_G = torch.unique_consecutive(expert_P, return_counts=True)
    ordered = order_by_size(counts_G, len(expert_P))
    if ordered is None:
        return _Touched(experts_G, Groups.of(counts_G), None)
    order_G, groups = ordered
    starts_G = counts_G.cumsum(0) - counts_G
    moved_G = starts_G[order_G] - (groups.counts_G.cumsum(0) - groups.counts_G)
    order_P = torch.repeat_interleave(moved_G, groups.counts_G) + torch.arange(len(expert_P), device=expert_P.device)
    return _Touched(experts_G[order_G], groups, order_P)


@dataclass(frozen=True)
class BlockGradients:
    """Gradients of a block's parameters: `weights` [G, ...] belong to experts `touched_G`, of `tokens_G` tokens."""

    weights: dict[str, torch.Tensor]
    touched_G: torch.Tensor
    tokens_G: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[BlockGradients]) -> BlockGradients:
        """Join the gradients of several backwards over one block, no two of which touched the same expert."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            weights={name: torch.cat([part.weights[name] for part in parts]) for name in parts[0].weights},
            touched_G=torch.cat([part.touched_G for part in parts]),
            tokens_G=torch.cat([part.tokens_G for part in parts]),
        )


class BlockBackward(NamedTuple):
    """What one backward over a block yields."""

    inputs_PD: torch.Tensor
    weight_P: torch.Tensor
    gradients: BlockGradients


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
