"""The gate for very many experts: E = n * n of them cost 2n scores. Path of a step: trunk -> **gate** -> dispatch.

Product keys (arXiv 1907.05242; as a gate over a million tiny experts, arXiv 2407.04153): expert i * n + j has logit
first_i + second_j, where each half of the token's query is scored against its own table of n sub-keys. The K best sums
lie among the K best rows times the K best columns, so n * n sums are never formed.
"""

# Shapes: T tokens, D d_model, C = D / 2 width of a sub-key, n = sqrt(E) sub-keys of a table (in names: S),
#         N experts that a head chooses, M chosen by heads before it, R candidate rows, L candidate columns.

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

from common.errors import ManifestError
from node.model.gate.heads import GateOfHeads
from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.manifest import ModelConfig

# K rows and columns hold the K best sums exactly; twice as many give the balancing bias something to choose from.
CANDIDATES_PER_CHOICE = 2

PAIRS_AT_ONCE = 2**22
"""Candidates of so many tokens are compared at once: with many experts per token all of them would want gigabytes."""


class ProductKeyGate(GateOfHeads):
    """2 sqrt(E) scores per token and head; E must be a square. All heads have the same sub-keys.

    What reads fixed codes needs no weights to make queries of them: a code's halves are as random as any mixture.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(model)
        self.n_sub_keys = math.isqrt(self.n_experts)
        if self.n_sub_keys**2 != self.n_experts or self.d_model % 2:
            raise ManifestError(
                f"model.gate: product_key needs experts_per_layer to be a square and d_model even; they are "
                f"{self.n_experts} and {self.d_model}. Take a square such as {self.n_sub_keys**2}, or gate = 'topk'"
            )
        std = self.d_model**-0.5  # each half-query has norm sqrt(D / 2), so that a logit starts with variance 1
        half = self.d_model // 2
        self.query_weight: Tensor | None = None
        if model.gate_reads == "hidden":
            shape = (self.n_heads * self.d_model, self.d_model)  # one head's query after the other's
            self.query_weight = nn.Parameter(torch.randn(shape, generator=generator) * std)
        self.sub_keys_2SC = nn.Parameter(torch.randn(2, self.n_sub_keys, half, generator=generator) * std)

    def choose_more(self, head: int, x_TD: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose a head's experts for each token; see `GateOfHeads.choose_more`."""
        query_TD = x_TD if self.query_weight is None else F.linear(x_TD, self._query(self.query_weight, head))
        # Half-queries are normalised, as the papers do with batch statistics, but per token: no state, no leak
        # between tokens.
        halves = [F.rms_norm(half_TC, half_TC.shape[-1:]) for half_TC in query_TD.chunk(2, dim=-1)]
        first_TS, second_TS = (F.linear(half_TC, self.sub_keys_2SC[side]) for side, half_TC in enumerate(halves))
        ids_TN = self._select(first_TS.detach(), second_TS.detach(), taken_TM, live_E)
        known_TN = ids_TN.clamp(min=0)
        n = self.n_sub_keys
        return ids_TN, first_TS.gather(1, known_TN // n) + second_TS.gather(1, known_TN % n)

    def _query(self, weight: Tensor, head: int) -> Tensor:
        return weight.view(self.n_heads, self.d_model, -1)[head]

    @torch.no_grad()
    def _select(self, first_TS: Tensor, second_TS: Tensor, taken_TM: Tensor, live_E: Tensor | None) -> Tensor:
        if live_E is not None:
            live_SS = live_E.view(self.n_sub_keys, self.n_sub_keys)
            first_TS = first_TS.masked_fill(~live_SS.any(1), -torch.inf)
            second_TS = second_TS.masked_fill(~live_SS.any(0), -torch.inf)
        scores = SubScores(
            first_TS=first_TS,
            second_TS=second_TS,
            taken_TM=taken_TM,
            bias_E=self.bias_E,
            live_E=live_E,
            score_=self.scores_,
        )
        n_more = self.experts_per_head
        rows_TR, columns_TL = self._shortlist(first_TS, second_TS, CANDIDATES_PER_CHOICE * n_more + taken_TM.shape[1])
        ids_TN = best_pairs(scores, rows_TR, columns_TL, n_more)
        short_T = (ids_TN == NO_EXPERT).any(1)
        if live_E is not None and bool(short_T.any()):
            ids_TN[short_T] = self._select_by_rows(scores.of_tokens(short_T))
        return ids_TN

    def _shortlist(self, first_TS: Tensor, second_TS: Tensor, n_best: int) -> tuple[Tensor, Tensor]:
        """The best rows [T, R] and columns [T, R], as many of each, among which each token's experts are looked for.

        Where biases are in units of the logits, those of a row (column) count on average: a shortlist that they did not
        reach would leave an expert for dead whose row is in nobody's, whatever its own bias.
        """
        n = self.n_sub_keys
        n_best = min(n_best, n)
        if self.score == "softmax":
            bias_SS = self.bias_E.view(n, n)
            first_TS, second_TS = first_TS + bias_SS.mean(1), second_TS + bias_SS.mean(0)
        return first_TS.topk(n_best).indices, second_TS.topk(n_best).indices

    def _select_by_rows(self, scores: SubScores) -> Tensor:
        """Select where the best rows and columns cross in too few live experts: N + M live rows, every column of them.

        Each of those rows has a live expert, so as many are found as are live and not taken, up to N.
        """
        n = self.n_sub_keys
        rows_TR = scores.first_TS.topk(min(self.experts_per_head + scores.taken_TM.shape[1], n)).indices
        columns_TL = torch.arange(n, device=rows_TR.device).expand(len(rows_TR), n)
        return best_pairs(scores, rows_TR, columns_TL, self.experts_per_head)


@dataclass(frozen=True, kw_only=True)
class SubScores:
    """Both halves' scores (-inf where a row or column has no live expert), and what selection adds or forbids."""

    first_TS: Tensor
    second_TS: Tensor
    taken_TM: Tensor
    bias_E: Tensor
    live_E: Tensor | None
    score_: Callable[[Tensor], Tensor]

    def of_tokens(self, chosen_T: Tensor) -> SubScores:
        """Return the scores of some of the tokens."""
        return replace(
            self,
            first_TS=self.first_TS[chosen_T],
            second_TS=self.second_TS[chosen_T],
            taken_TM=self.taken_TM[chosen_T],
        )

    def split(self, n_tokens: int) -> list[SubScores]:
        """Yield the scores, `n_tokens` tokens at a time."""
        parts = zip(*(t.split(n_tokens) for t in (self.first_TS, self.second_TS, self.taken_TM)), strict=True)
        return [replace(self, first_TS=first, second_TS=second, taken_TM=taken) for first, second, taken in parts]


def best_pairs(scores: SubScores, rows_TR: Tensor, columns_TL: Tensor, n_best: int) -> Tensor:
    """Ids [T, n_best] of the best live experts where the rows cross the columns; -1 where they cross in fewer."""
    at_once = max(1, PAIRS_AT_ONCE // (rows_TR.shape[1] * columns_TL.shape[1]))
    parts = zip(scores.split(at_once), rows_TR.split(at_once), columns_TL.split(at_once), strict=True)
    return torch.cat([_best_pairs(of, rows_TR, columns_TL, n_best) for of, rows_TR, columns_TL in parts])


def _best_pairs(scores: SubScores, rows_TR: Tensor, columns_TL: Tensor, n_best: int) -> Tensor:
    logits_TRL = scores.first_TS.gather(1, rows_TR)[:, :, None] + scores.second_TS.gather(1, columns_TL)[:, None, :]
    ids_TX = (rows_TR[:, :, None] * scores.second_TS.shape[1] + columns_TL[:, None, :]).flatten(1)
    selection_TX = scores.score_(logits_TRL.flatten(1)) + scores.bias_E[ids_TX]
    for taken_T in scores.taken_TM.unbind(1):
        selection_TX.masked_fill_(ids_TX == taken_T[:, None], -torch.inf)
    if scores.live_E is not None:
        selection_TX.masked_fill_(~scores.live_E[ids_TX], -torch.inf)
    best = selection_TX.topk(n_best, dim=-1)
    return ids_TX.gather(1, best.indices).masked_fill(best.values == -torch.inf, NO_EXPERT)
