"""Gates that nobody would use: nulls that a learnt gate has to beat.

Shapes: T tokens, D d_model, E experts of a layer, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from node.model.gate import Gate, build_gate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from protocol.manifest import ModelConfig

BIGRAMS = 65_536


class HashGate(Gate):
    """K experts by a fixed random table over the last two bytes, evenly weighted (hash layers, arXiv 2106.04426).

    Two bytes, because one has 256 values, which could reach no more than 256 K experts. What the tokens are is not in
    x_TD: `watch` has the model tell it. For one forward at a time.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(model)
        shape = (BIGRAMS, self.experts_per_token)
        first_X1 = torch.randint(self.n_experts, (BIGRAMS, 1), generator=generator)
        # Distinct experts of a row: a random start, and steps that never come round.
        stride_XK = torch.randint(max(1, self.n_experts // self.experts_per_token), shape, generator=generator) + 1
        stride_XK[:, 0] = 0
        self.register_buffer("table_XK", (first_X1 + stride_XK.cumsum(1)) % self.n_experts, persistent=False)
        self.table_XK: Tensor
        self._bigram_T = torch.zeros(0, dtype=torch.int64)

    def watch(self, model: nn.Module) -> None:
        """Take the bytes from the inputs of `model`."""
        model.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids_BT = inputs[0]
        before_BT = torch.zeros_like(ids_BT)
        before_BT[:, 1:] = ids_BT[:, :-1]
        self._bigram_T = (before_BT * 256 + ids_BT).flatten()

    def choose(self, x_TD: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - all are live here
        """Choose K experts for each token; see `Gate.choose`."""
        ids_TK = self.table_XK[self._bigram_T]
        return ids_TK, x_TD.new_zeros(ids_TK.shape)


def frozen(gate: Gate) -> Gate:
    """The gate as it starts, for ever: only the balancing biases go on moving."""
    return gate.requires_grad_(requires_grad=False)


def gate_of(model: ModelConfig, name: str, *, is_frozen: bool, generator: torch.Generator) -> Gate:
    """A gate by an arm's name for it."""
    gate = HashGate(model, generator) if name == "hash" else build_gate(model, generator)
    return frozen(gate) if is_frozen else gate
