"""One expert trained at home: the run's trunk and all other experts give gradients, and learn nothing from it."""

# Shapes: T tokens of a call, K experts per token, D model width, P tokens that chose the expert, N tokens of a batch.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from node.model.experts.adam import zero_state
from node.model.experts.block import Block
from node.model.experts.kinds import expert_kind
from node.model.experts.layer import layer_backward, layer_forward
from node.model.pairs import NO_EXPERT, Combined, Pairs
from node.trainer.train_step import next_token_loss

if TYPE_CHECKING:
    from node.model.expert_file import ExpertId, Weights
    from node.model.experts.block import BlockGradients
    from node.model.moe import Experts, MoE
    from node.model.trunk import Trunk
    from protocol.manifest import Manifest


class _Kept(NamedTuple):
    """What a backward through the expert needs."""

    x_TD: torch.Tensor
    token_P: torch.Tensor
    weight_P: torch.Tensor

    @property
    def pairs(self) -> Pairs:
        """Name the only expert of its block in every pair."""
        return Pairs(self.token_P, torch.zeros_like(self.token_P), self.weight_P)


class ExpertsWithOneLocal:
    """Experts of a run, one of which is here; `experts` are asked for all others, and must not be taught."""

    def __init__(self, experts: Experts, place: ExpertId, weights: Weights, manifest: Manifest) -> None:
        self.run_tokens = experts.run_tokens
        self._experts, self._place, self._manifest = experts, place, manifest
        self._block = _block_of_one(place, weights, manifest)
        self._gradients: BlockGradients | None = None

    @property
    def weights(self) -> Weights:
        """A copy of the expert as it is."""
        return {name: tensor[0].clone() for name, tensor in self._block.params.items()}

    def live_experts(self, layer: int) -> torch.Tensor:
        """Return the live experts of the run, and the one that is here."""
        return self._place.made_live(layer, self._experts.live_experts(layer))

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Weighted sums; nobody else is asked for the expert that is here."""
        if layer != self._place.layer:
            return self._experts.forward(layer, x_TD, expert_ids_TK, weights_TK, keep=keep)
        own_TK = expert_ids_TK == self._place.expert
        others_TK = expert_ids_TK.masked_fill(own_TK, NO_EXPERT)
        rest = self._experts.forward(layer, x_TD, others_TK, weights_TK, keep=False)
        token_P, slot_P = own_TK.cpu().nonzero(as_tuple=True)
        kept = _Kept(x_TD.detach().cpu(), token_P, weights_TK.detach().cpu()[token_P, slot_P])
        combined_TD = rest.combined_TD.cpu()
        if len(token_P):
            combined_TD = combined_TD + layer_forward([self._block], kept.x_TD, kept.pairs)
        return Combined(combined_TD, rest.answered_TK.cpu() | own_TK.cpu(), kept)

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        """The run's own gradients; those of the expert that is here are kept for `step`, and nothing flows below it."""
        if not isinstance(ticket, _Kept):
            return self._experts.backward(ticket, grad_TD)
        grad_TD, n_choices = grad_TD.detach().cpu(), len(ticket.x_TD) * self._manifest.model.experts_per_token
        if len(ticket.token_P):
            layer_backward([self._block], ticket.x_TD, ticket.pairs, grad_TD, self._keep)
        return torch.zeros_like(grad_TD), grad_TD.new_zeros(n_choices)

    def _keep(self, _block: Block, gradients: BlockGradients) -> None:
        self._gradients = gradients

    def step(self, lr: float) -> None:
        """Move the expert by what the last backward found, as a host would; nothing if no token chose it."""
        gradients, self._gradients = self._gradients, None
        if gradients is not None:
            self._block.step(gradients, lr, self._manifest.optimizer)


class LocalExpertSteps:
    """Steps of the expert in `layer` of `model`, whose trunk stays as it is, on `device`; the expert is on the CPU."""

    def __init__(self, model: Trunk, layer: MoE, experts: ExpertsWithOneLocal, device: torch.device) -> None:
        self._model, self._experts, self._device = model.eval().requires_grad_(requires_grad=False), experts, device
        # Autograd then goes from the loss down to what the expert's layer reads, and no further.
        layer.register_forward_pre_hook(self._begin)
        self._read_ND = torch.empty(0)

    def step(self, ids: torch.Tensor, lr: float) -> float:
        """Learn from windows [B, T + 1] at rate `lr`; nats per token before. TooFewExpertsError if it cannot."""
        loss = next_token_loss(self._model, ids, self._device)
        torch.autograd.grad(loss, self._read_ND)
        self._experts.step(lr)
        return float(loss.detach())

    def _begin(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x_ND, *others = inputs
        self._read_ND = x_ND.detach().requires_grad_()
        return self._read_ND, *others


def _block_of_one(place: ExpertId, weights: Weights, manifest: Manifest) -> Block:
    params = {name: tensor[None].clone() for name, tensor in weights.items()}
    return Block(
        id=place.block(manifest.model),
        experts=range(1),
        kind=expert_kind(manifest.model.expert_kind),
        params=params,
        adam=zero_state(params),
        learnt_E=torch.zeros(1, dtype=torch.float64),
    )
