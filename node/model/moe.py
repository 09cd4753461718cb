"""The MoE layer as a torch module: gate, dispatch, experts, combine.

`LocalMoE` holds its blocks; `RemoteMoE`, in `node/trainer/remote_moe.py`, calls the peers that hold them.

A researcher's own model uses either like any feed-forward layer; see `docs/architecture.md`.
Shapes: T tokens, K experts per token, D model width, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from common.errors import InvalidInputError, TooFewExpertsError
from common.locks import CopyableLock
from node.model.experts.block import Block, new_block
from node.model.experts.layer import layer_backward, layer_forward
from node.model.gate import build_gate
from node.model.learning_rate import learning_rate_factor
from node.model.pairs import Combined, Pairs, flat_pairs
from protocol.manifest import BlockId
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.model.experts.block import BlockGradients
    from node.model.gate import ChoiceSummary, Gate
    from protocol.manifest import Manifest


class Experts(Protocol):
    """Where a layer's experts are: `Dispatcher` for a swarm, `LocalExperts` for this process."""

    run_tokens: int

    def live_experts(self, layer: int) -> torch.Tensor:
        """`live_E` (bool): experts that can be called now."""

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Weighted sum of the chosen experts' outputs per token."""

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        """Gradients for tokens [T, D] and choices [T * K]; steps the experts once."""


class MoE(nn.Module):
    """One layer of gated experts. Safe to call from several threads at once: one per micro-batch in flight."""

    def __init__(self, gate: Gate, experts: Experts, layer: int) -> None:
        super().__init__()
        self.gate = gate
        self.layer = layer
        self._experts = experts
        self._lock = CopyableLock()
        self._chosen: ChoiceSummary | None = None

    # There is nothing to compile in calls to other machines: a compiled model is left and entered again here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_TD: torch.Tensor, gate_x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., D], of the input's type, or under autocast of that of autocast, as `nn.Linear` does.

        The gate chooses by `gate_x_TD` if it is given: codes of the tokens themselves, for example. It has the shape of
        x_TD, or one more dimension before the last, for the gate's heads.

        Raises:
            InvalidInputError: the input has another width, or holds NaN, infinity or what is nearly that.
            TooFewExpertsError: no expert is live, or too few answer.
        """
        device = x_TD.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_TD.dtype
        # The gate and the experts have types of their own; scores in half precision would choose other experts.
        with torch.autocast(device, enabled=False):
            gate_x_TD = x_TD if gate_x_TD is None else gate_x_TD
            return self._combined(x_TD.to(self.gate.dtype), gate_x_TD.to(self.gate.dtype)).to(dtype)

    def _combined(self, x_TD: torch.Tensor, gate_x_TD: torch.Tensor) -> torch.Tensor:
        shape = x_TD.shape
        by_head = gate_x_TD.shape[len(shape) - 1 : -1]
        if gate_x_TD.shape != (*shape[:-1], *by_head, shape[-1]) or len(by_head) > 1:
            raise InvalidInputError("gate_x_TD", f"has shape {tuple(gate_x_TD.shape)}; it takes x_TD's {tuple(shape)}")
        x_TD, gate_x_TD = x_TD.reshape(-1, shape[-1]), gate_x_TD.reshape(-1, *by_head, shape[-1])
        live_E = self._experts.live_experts(self.layer)
        if not bool(live_E.any()):
            raise TooFewExpertsError(f"layer {self.layer}: none of its {len(live_E)} experts has a live replica")
        choice = self.gate(gate_x_TD, live_E.to(x_TD.device))
        keep = torch.is_grad_enabled() and (x_TD.requires_grad or choice.weights_TK.requires_grad)
        combined_TD, answered_TK = _Combine.apply(  # type: ignore[no-untyped-call]
            x_TD, choice.weights_TK, choice.expert_ids_TK, self._experts, self.layer, keep
        )
        if self.training:
            chosen = choice.chosen()
            with self._lock:
                self._chosen = chosen if self._chosen is None else self._chosen + chosen
        return _renormalise(combined_TD, choice.weights_TK, answered_TK).view(shape)

    def balance(self) -> int:
        """Move the gate's biases by the loads since the last call (once per step); returns the pairs over capacity."""
        with self._lock:
            chosen, self._chosen = self._chosen, None
        if chosen is None:
            return 0
        live_E = self._experts.live_experts(self.layer)
        self.gate.update_balance(chosen.load_E, live_E)
        self.gate.observe(chosen, live_E)
        return chosen.overflow


class LocalMoE(MoE):
    """An MoE layer with its blocks in this process: the reference for correctness, and the limit for speed."""

    def __init__(self, experts: LocalExperts, layer: int, generator: torch.Generator) -> None:
        super().__init__(build_gate(experts.manifest.model, generator), experts, layer)


class LocalExperts:
    """Every block of every layer, computed here. One lock: concurrent micro-batches take turns.

    `make_block` gives each block; without it they are as they are before any training.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device | None = None,
        make_block: Callable[[Manifest, BlockId, torch.device], Block] = new_block,
    ) -> None:
        self.manifest, self.run_tokens = manifest, 0
        device = device or torch.device("cpu")
        model = manifest.model
        self.blocks: dict[int, list[Block]] = {
            layer: [make_block(manifest, BlockId(layer, block), device) for block in range(model.blocks_per_layer)]
            for layer in range(model.n_layers)
        }
        self._all_live_E = torch.ones(model.experts_per_layer, dtype=torch.bool)
        self._lock = CopyableLock()

    def live_experts(self, layer: int) -> torch.Tensor:  # noqa: ARG002 - one interface with Dispatcher
        """All experts are live here."""
        return self._all_live_E

    def blocks_for_call(self, layer: int) -> list[Block]:
        """The blocks, in order, that one forward and its backward use; called with the lock held."""
        return self.blocks[layer]

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Combine over this process's blocks."""
        flat = flat_pairs(expert_ids_TK)
        pairs = Pairs(
            token_P=flat // expert_ids_TK.shape[1],
            expert_P=expert_ids_TK.reshape(-1)[flat],
            weight_P=weights_TK.detach().reshape(-1)[flat].to(DTYPES[self.manifest.dtype]),
        )
        x_TD = x_TD.detach().to(DTYPES[self.manifest.dtype])
        with self._lock:
            blocks = self.blocks_for_call(layer)
            combined_TD = layer_forward(blocks, x_TD, pairs)
        return Combined(combined_TD, expert_ids_TK >= 0, (blocks, x_TD, pairs, flat) if keep else None)

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        """Gradients; steps the touched experts."""
        blocks, x_TD, pairs, flat = ticket
        grad_TD = grad_TD.to(x_TD.dtype)
        optimizer = self.manifest.optimizer
        lr = optimizer.expert_lr * learning_rate_factor(optimizer, self.run_tokens)
        with self._lock:
            gradients = layer_backward(blocks, x_TD, pairs, grad_TD, lambda block, own: self.learn(block, own, lr))
        grad_weight = grad_TD.new_zeros(len(x_TD) * self.manifest.model.experts_per_token)
        grad_weight[flat] = gradients.weight_P
        return gradients.tokens_TD, grad_weight

    def learn(self, block: Block, gradients: BlockGradients, lr: float) -> None:
        """Step a block that a backward has touched."""
        block.step(gradients, lr, self.manifest.optimizer)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - torch's calling convention
        ctx: Any,  # noqa: ANN401
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        experts: Experts,
        layer: int,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = experts.forward(layer, x_TD, expert_ids_TK, weights_TK, keep=keep)
        ctx.experts, ctx.ticket, ctx.weights_shape = experts, result.ticket, weights_TK.shape
        answered_TK = result.answered_TK.to(x_TD.device)
        ctx.mark_non_differentiable(answered_TK)
        return result.combined_TD.to(x_TD.device), answered_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        grad_x_TD, grad_weight = ctx.experts.backward(ctx.ticket, grad_TD)
        grad_x_TD, grad_weight = grad_x_TD.to(grad_TD.device), grad_weight.to(grad_TD.device)
        return grad_x_TD, grad_weight.view(ctx.weights_shape), None, None, None, None


def _renormalise(combined_TD: torch.Tensor, weights_TK: torch.Tensor, answered_TK: torch.Tensor) -> torch.Tensor:
    """Scale each token's sum as if only the experts that answered had been chosen."""
    chosen_TK = weights_TK > 0
    if bool((answered_TK | ~chosen_TK).all()):
        return combined_TD
    all_T1 = weights_TK.sum(1, keepdim=True)
    got_T1 = (weights_TK * answered_TK).sum(1, keepdim=True)
    return combined_TD * torch.where(got_T1 > 0, all_T1 / got_T1.clamp(min=1e-12), torch.zeros_like(got_T1))
