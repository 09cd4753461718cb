"""Gates of several heads, each choosing a part of a token's experts. Path of a step: trunk -> **gate** -> dispatch."""

# Shapes: T tokens, D d_model, K experts per token, Q heads, N = K / Q experts that a head chooses,
#         M those that the heads before it have chosen.

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from node.model.gate.base import HEADS_DIMS, Gate

if TYPE_CHECKING:
    from torch import Tensor

    from protocol.manifest import ModelConfig


class GateOfHeads(Gate):
    """Each head chooses as many experts as the others, none that one before it has chosen; one softmax weighs them all.

    The heads read the same input, or each its own.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.experts_per_head = model.experts_per_token // model.gate_heads

    def choose(self, x_TD: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose K experts for each token, [T, D], or [T, Q, D] for an input of each head; see `Gate.choose`."""
        ids_TK = x_TD.new_empty(len(x_TD), 0, dtype=torch.int64)
        logits_TK = x_TD.new_empty(len(x_TD), 0)
        for head in range(self.n_heads):
            of_head_TD = x_TD[:, head] if x_TD.dim() == HEADS_DIMS else x_TD
            ids_TN, logits_TN = self.choose_more(head, of_head_TD, ids_TK, live_E)
            ids_TK, logits_TK = torch.cat((ids_TK, ids_TN), 1), torch.cat((logits_TK, logits_TN), 1)
        return ids_TK, logits_TK

    @abstractmethod
    def choose_more(self, head: int, x_TD: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids [T, N] and logits [T, N] of a head's experts, as those of `choose`, none of them among `taken_TM`."""
