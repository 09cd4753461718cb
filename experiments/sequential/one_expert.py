"""One expert of a trained model's last layer, with everything around it frozen and computed once.

Only the tokens that the gate sends to the expert change when it does, and, in the last layer, only their own
predictions. So an update is measured on the whole held-out text for the price of a few matrix products.
"""

# Shapes: N windows, T positions, D model width, H expert width, P tokens that reach the expert, V byte values.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.nn import functional

from experiments.arms.training import TrainRun
from node.model.rope import rope_rotation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from experiments.arms.arm import TrainSpec
    from experiments.arms.training import Model
    from experiments.harness.experiment import TrialContext
    from node.data import TextDataset
    from node.model.gate import GateOutput
    from node.model.moe import MoE
    from node.model.transformer import Transformer, TransformerLayer

    Weights = dict[str, torch.Tensor]


def trained_model(spec: TrainSpec, dataset: TextDataset, context: TrialContext) -> Model:
    """Train what `spec` describes, or take it from where a trial that was cut has left it."""
    run = TrainRun(spec, context, dataset)
    run.go()
    run.save()
    run.model.trunk.eval()
    return run.model


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The tokens of a text that reach one expert: its inputs, its share, and the sum of everything else.

    `rest_PD` is the stream before the final norm without this expert; `window_P` says where each token stands.
    """

    input_PD: torch.Tensor
    weight_P: torch.Tensor
    rest_PD: torch.Tensor
    target_P: torch.Tensor
    window_P: NDArray[np.int64]
    n_windows: int


class OneExpert:
    """Expert `index` of the last layer: its weights, and the loss of the model with others in its place."""

    def __init__(self, model: Model, index: int) -> None:
        self.index, self._trunk = index, model.trunk
        self.context = model.trunk.context
        last = model.experts.blocks[len(model.trunk.layers) - 1]
        block = last[index // model.manifest.model.experts_per_block]
        self.weights = {name: p[index - block.experts.start].clone() for name, p in block.params.items()}

    def losses(self, reached: Reached, weights: Weights, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Nats of the reached tokens, with `weights` as the expert."""
        hidden_PH = functional.gelu(reached.input_PD[rows] @ weights["w_in"])
        stream_PD = reached.rest_PD[rows] + reached.weight_P[rows, None] * (hidden_PH @ weights["w_out"])
        logits_PV = functional.linear(self._trunk.final_norm(stream_PD), self._trunk.head_VD)
        return functional.cross_entropy(logits_PV, reached.target_P[rows], reduction="none")

    @torch.no_grad()
    def gains(self, reached: Reached, weights: Weights) -> NDArray[np.float64]:
        """Mean gain of each window, nats per byte, from putting `weights` in the expert's place."""
        gain_P = (self.losses(reached, self.weights) - self.losses(reached, weights)).double().cpu().numpy()
        sums = np.bincount(reached.window_P, weights=gain_P, minlength=reached.n_windows)
        return np.asarray(sums / self.context, dtype=np.float64)


@torch.no_grad()
def expert_loads(model: Model, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tokens [E] of the text that reach each expert of the last layer."""
    return torch.stack([_last_layer(model.trunk, ids)[2].load_E for ids in batches]).sum(0)


@torch.no_grad()
def reached_by(model: Model, experts: Iterable[OneExpert], batches: Iterable[torch.Tensor]) -> list[Reached]:
    """One pass over a text: for each of `experts` the tokens that reach it."""
    experts = list(experts)
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in experts]
    n_windows = 0
    for ids in batches:
        input_ND, stream_ND, choice = _last_layer(model.trunk, ids)
        for expert, own in zip(experts, parts, strict=True):
            token_P, slot_P = (choice.expert_ids_TK == expert.index).nonzero(as_tuple=True)
            input_PD, weight_P = input_ND[token_P], choice.weights_TK[token_P, slot_P]
            output_PD = functional.gelu(input_PD @ expert.weights["w_in"]) @ expert.weights["w_out"]
            rest_PD = stream_ND[token_P] - weight_P[:, None] * output_PD
            window_P = token_P // expert.context + n_windows
            target_P = ids[:, 1:].to(token_P.device).flatten()[token_P]
            own.append((input_PD, weight_P, rest_PD, target_P, window_P))
        n_windows += len(ids)
    return [_joined(own, n_windows) for own in parts]


def _joined(parts: list[tuple[torch.Tensor, ...]], n_windows: int) -> Reached:
    input_PD, weight_P, rest_PD, target_P, window_P = (torch.cat(column) for column in zip(*parts, strict=True))
    return Reached(
        input_PD=input_PD,
        weight_P=weight_P,
        rest_PD=rest_PD,
        target_P=target_P,
        window_P=window_P.cpu().numpy(),
        n_windows=n_windows,
    )


def _last_layer(trunk: Transformer, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, GateOutput]:
    """Inputs of the last layer's experts, the stream after them, and the gate's choice, of windows [B, T + 1]."""
    x_BTD = functional.embedding(ids[:, :-1].to(trunk.embedding_VD.device), trunk.embedding_VD)
    rotation = rope_rotation(x_BTD.shape[1], trunk.channels, x_BTD)
    *before, _ = trunk.layers
    for layer in before:
        x_BTD = layer(x_BTD, rotation)
    last = cast("TransformerLayer", trunk.layers[-1])
    x_BTD = x_BTD + last.attention(last.attention_norm(x_BTD), rotation)
    input_ND = last.moe_norm(x_BTD).flatten(0, 1)
    moe = cast("MoE", last.moe)
    return input_ND, x_BTD.flatten(0, 1) + moe(input_ND), moe.gate(input_ND)


def trained_further(
    expert: OneExpert, reached: Reached, *, steps: int, lr: float, seed: int, shuffled: bool = False
) -> Weights:
    """The expert after `steps` steps of Adam, 256 tokens each, on its own tokens of a text, the rest frozen.

    `shuffled`: with each token's next byte taken from another token.
    """
    generator = torch.Generator().manual_seed(seed)
    if shuffled:
        order_P = torch.randperm(len(reached.target_P), generator=generator)
        reached = Reached(**{**vars(reached), "target_P": reached.target_P[order_P]})
    weights = {name: tensor.clone().requires_grad_() for name, tensor in expert.weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(reached.target_P), (256,), generator=generator)
        gradients = torch.autograd.grad(expert.losses(reached, weights, rows).mean(), list(weights.values()))
        for parameter, gradient in zip(weights.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return {name: tensor.detach() for name, tensor in weights.items()}
