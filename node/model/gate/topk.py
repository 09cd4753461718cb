"""The plain gate: one linear map scores every expert. Path of a step: trunk -> **gate** -> dispatch."""

# Shapes: T tokens, D d_model, E experts of the layer, N experts that a head chooses, M chosen by heads before it,
#         Q heads.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

from node.model.gate.heads import GateOfHeads
from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from protocol.manifest import ModelConfig


class TopKGate(GateOfHeads):
    """E scores per token and head; suits up to a few thousand experts. All heads have the same keys."""

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(model)
        shape = (self.n_experts, self.d_model)
        self.expert_keys_ED = nn.Parameter(torch.randn(shape, generator=generator) * self.d_model**-0.5)

    def choose_more(
        self,
        head: int,  # noqa: ARG002 - what it reads is all that sets it apart
        x_TD: Tensor,
        taken_TM: Tensor,
        live_E: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Choose a head's experts for each token; see `GateOfHeads.choose_more`."""
        ids_TN = self._select(x_TD, taken_TM, live_E)
        # The chosen logits are computed again, with gradient: K dot products per token. Keeping the E of the selection
        # for backward would cost T * E floats and a dense E-wide product where all but K columns are zero.
        keys_TND = F.embedding(ids_TN.clamp(min=0), self.expert_keys_ED)
        return ids_TN, (keys_TND * x_TD[:, None]).sum(-1)

    @torch.no_grad()
    def _select(self, x_TD: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> Tensor:
        # In place, as T x E scores are more than a cache holds: each copy costs as much as the product.
        logits_TE = F.linear(x_TD, self.expert_keys_ED).to(self.bias_E.dtype)
        selection_TE = self.scores_(logits_TE).add_(self.bias_E)
        if live_E is not None and not bool(live_E.all()):
            selection_TE.masked_fill_(~live_E, -torch.inf)
        if taken_TM.shape[1]:
            # An id of -1 says that no expert was left, so that there is none to be taken twice.
            selection_TE.scatter_(1, taken_TM.clamp(min=0), -torch.inf)
        best = selection_TE.topk(self.experts_per_head, dim=-1)
        return best.indices.masked_fill(best.values == -torch.inf, NO_EXPERT)
