"""The gate that learns nothing: experts by a hash of a code. Path of a step: trunk -> **gate** -> dispatch.

A hash of the last tokens is as good a choice as any that was learnt here, and it never changes (hash layers,
arXiv 2106.04426): an expert meets the same contexts for the whole of training. It costs no scores and no weights.
"""

# Shapes: T tokens, D d_model, Q heads, N experts that a head chooses, M chosen by heads before it, R candidates of a
#         token in the order in which they are wanted, X strides, L live experts, E experts of the layer.

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import InvalidInputError
from node.model.gate.base import HEADS_DIMS
from node.model.gate.heads import GateOfHeads
from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from protocol.manifest import ModelConfig

CODE_BITS = 62
"""So many signs of a code are hashed: no two of a million contexts are likely to have the same."""

MAX_STRIDES = 1024
SPARES = 16
"""Candidates beyond those that are needed, where some experts are not live."""

MIX = (-4658895280553007687, -7723592293110705685)
"""The multipliers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers."""


class HashGate(GateOfHeads):
    """A token's candidates are a walk over all experts from a start and by a stride that its code's signs decide.

    The first that are live are chosen, so that the choice of a token whose experts are live is never another. All weigh
    alike, and nothing balances the load: it is as uneven as the contexts are.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(model)
        n = self.n_experts
        # A stride that shares no factor with the number of experts reaches all of them before it comes back.
        strides = [stride for stride in range(1, max(2, n)) if math.gcd(stride, n) == 1]
        picked = torch.randperm(len(strides), generator=generator)[:MAX_STRIDES]
        salt_Q = torch.randint(1 << 62, (self.n_heads,), generator=generator) * 2 + 1
        self.register_buffer("strides_X", torch.tensor(strides)[picked], persistent=False)
        self.register_buffer("salt_Q", salt_Q, persistent=False)
        self.strides_X: Tensor
        self.salt_Q: Tensor

    def choose(self, x_TD: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose K experts for each token; see `GateOfHeads.choose`. InvalidInputError for what cannot be codes."""
        if x_TD.dim() != HEADS_DIMS:
            raise InvalidInputError(
                "x_TD",
                "is one input for all heads; the gate hash chooses by a code of the tokens for each: give codes as the "
                "layer's second argument, or take a gate that learns, such as topk",
            )
        return super().choose(x_TD, live_E)

    def update_balance(self, load_E: Tensor, live_E: Tensor | None = None) -> None:
        """Nothing: the choice does not go by biases."""

    @torch.no_grad()
    def choose_more(self, head: int, x_TD: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose a head's experts for each token; see `GateOfHeads.choose_more`."""
        hash_T = mixed(sign_bits(x_TD) * self.salt_Q[head])
        ids_TN = self._first(self._walk(hash_T, live_E, taken_TM.shape[1]), taken_TM, live_E)
        short_T = (ids_TN == NO_EXPERT).any(1)
        if live_E is not None and bool(short_T.any()):
            ids_TN[short_T] = self._first(self._walk_live(hash_T[short_T], live_E, taken_TM), taken_TM[short_T], live_E)
        return ids_TN, x_TD.new_zeros(ids_TN.shape)

    def _walk(self, hash_T: Tensor, live_E: Tensor | None, n_taken: int) -> Tensor:
        """Candidates [T, R]: as many as are enough where all experts are live, and some more where not."""
        spares = 0 if live_E is None or bool(live_E.all()) else SPARES
        step_R = torch.arange(min(self.n_experts, self.experts_per_head + n_taken + spares), device=hash_T.device)
        stride_T = self.strides_X[mixed(hash_T).remainder(len(self.strides_X))]
        return (hash_T.remainder(self.n_experts)[:, None] + step_R * stride_T[:, None]) % self.n_experts

    def _walk_live(self, hash_T: Tensor, live_E: Tensor, taken_TM: Tensor) -> Tensor:
        """Candidates [T, R] among the live experts alone, for tokens whose first ones are not live."""
        live_L = live_E.nonzero().flatten()
        step_R = torch.arange(min(len(live_L), self.experts_per_head + taken_TM.shape[1]), device=hash_T.device)
        n_live = max(1, len(live_L))
        return live_L[(hash_T.remainder(n_live)[:, None] + step_R) % n_live]

    def _first(self, candidates_TR: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> Tensor:
        """The first N candidates of each token that are live and not taken, or -1."""
        free_TR = (candidates_TR[:, :, None] != taken_TM[:, None, :]).all(2)
        if live_E is not None:
            free_TR &= live_E[candidates_TR]
        n_candidates, n_wanted = candidates_TR.shape[1], self.experts_per_head
        wish_TR = free_TR * torch.arange(n_candidates, 0, -1, device=free_TR.device)
        best = wish_TR.topk(min(n_wanted, n_candidates), dim=1)
        ids_TN = candidates_TR.gather(1, best.indices).masked_fill(best.values == 0, NO_EXPERT)
        missing = (0, n_wanted - ids_TN.shape[1])
        return torch.nn.functional.pad(ids_TN, missing, value=NO_EXPERT)


def sign_bits(x_TD: Tensor) -> Tensor:
    """The first signs of each row as the bits of an int64."""
    bits_TD = x_TD[:, :CODE_BITS] > 0
    return (bits_TD * (1 << torch.arange(bits_TD.shape[1], device=x_TD.device))).sum(1)


def mixed(value_T: Tensor) -> Tensor:
    """A hash of int64 numbers whose every bit depends on all of theirs."""
    for multiplier in MIX:
        value_T = (value_T ^ (value_T >> 31)) * multiplier
    return value_T ^ (value_T >> 32)
