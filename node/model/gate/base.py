"""What every gate does once it has chosen: normalise weights, hold capacity, balance load.

Path of a step: trunk -> **gate** -> dispatch. Forward changes no state, so several micro-batches may run it at once;
the trainer calls `update_balance` and `observe` once per optimizer step with the loads of its micro-batches summed.
"""

# Shapes: T tokens, D d_model, E experts of the layer, K experts per token, P = T * K (token, expert) pairs, Q heads.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

from common.errors import InvalidInputError, ManifestError
from node.model.gate.stats import ChoiceSummary, GateStats, LoadWindow, effective_experts
from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from protocol.manifest import GateScore, ModelConfig

MATRIX_DIMS, HEADS_DIMS = 2, 3

GATE_BIAS = "bias_E"
"""Name of the buffer that balance moves."""

LOAD_MEMORY = 0.9
"""What the mean load that `proportional` balances by keeps of itself in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOutput:
    """What one forward chose.

    expert_ids_TK: int64 index within the layer, or -1 where no live expert, or none with room, was left.
    weights_TK: differentiable; each row sums to 1 over its chosen experts, and is all 0 where there are none.
    load_E: int64 pairs per expert, before capacity.
    overflow: pairs dropped by capacity.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    load_E: Tensor
    overflow: int

    def chosen(self) -> ChoiceSummary:
        """What the statistics count of this."""
        effective_k, n_tokens = effective_experts(self.weights_TK)
        return ChoiceSummary(load_E=self.load_E, overflow=self.overflow, effective_k=effective_k, n_tokens=n_tokens)


class Gate(nn.Module, ABC):
    """Experts are selected by score + bias and weighted by score alone (arXiv 2408.15664).

    With `gate_score = "sigmoid"` a score is the logit's sigmoid; a token's weights are the scores of its experts over
    their sum. With `"softmax"` the score is the logit itself, and the weights are the softmax of the chosen: its
    gradient does not fade where logits are large, as those of the chosen are. `balance_rate` is in units of the score.
    """

    bias_E: Tensor
    mean_load_E: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        if model.experts_per_token > model.experts_per_layer:
            raise ManifestError(
                f"model.experts_per_token: is {model.experts_per_token}, more than experts_per_layer = "
                f"{model.experts_per_layer}; lower it"
            )
        self.d_model = model.d_model
        self.n_experts = model.experts_per_layer
        self.experts_per_token = model.experts_per_token
        self.n_heads = model.gate_heads
        self.capacity_factor = model.capacity_factor
        self.balance_rate, self.balance = model.balance_rate, model.balance
        self.score: GateScore = model.gate_score
        self.register_buffer(GATE_BIAS, torch.zeros(self.n_experts))
        if self.balance == "proportional":
            self.register_buffer("mean_load_E", torch.zeros(self.n_experts))
        self._window = LoadWindow(self.n_experts)
        self.kept_fraction: float | None = None
        """What `ChoiceProbe` last found."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in: that of its parameters, or of its biases if it has none."""
        return next(self.parameters(), self.bias_E).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert for `to` and `half`; buffers stay float32 at least, since bfloat16 would lose a step of balance."""
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.bias_E.dtype).bits < torch.finfo(torch.float32).bits:
            for name, buffer in before.items():
                setattr(self, name, buffer.to(self.bias_E.device))
        return self

    def forward(self, x_TD: Tensor, live_E: Tensor | None = None) -> GateOutput:
        """Choose among the experts where the bool mask `live_E` is true (None: all).

        With several heads x_TD may be [T, Q, D], which gives each head what it reads.

        Capacity holds in training mode only: ceil(capacity_factor * T * K / live experts) pairs per expert, the lowest
        weights dropped. InvalidInputError for an input of the wrong shape, or a mask that is not bool.
        """
        self._check(x_TD, live_E)
        live_E = None if live_E is None else live_E.to(x_TD.device)
        ids_TK, logits_TK = self.choose(x_TD, live_E)
        log_scores_TK = self.log_scores(logits_TK.to(self.bias_E.dtype))
        return allot(ids_TK, log_scores_TK, self.n_experts, self._capacity(x_TD.shape[0], live_E))

    @abstractmethod
    def choose(self, x_TD: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K], -1 where fewer than K are live, and their differentiable logits [T, K] (any at -1)."""

    def scores_(self, logits: Tensor) -> Tensor:
        """What selection adds the biases to; may overwrite `logits`."""
        return logits if self.score == "softmax" else logits.sigmoid_()

    def log_scores(self, logits_TK: Tensor) -> Tensor:
        """What the softmax of the chosen is taken of for their weights."""
        return logits_TK if self.score == "softmax" else F.logsigmoid(logits_TK)

    @torch.no_grad()
    def update_balance(self, load_E: Tensor, live_E: Tensor | None = None) -> None:
        """Move each live expert's bias towards the mean load of live experts, by at most balance_rate.

        With `balance = "sign"` it is the whole of balance_rate, whatever the load (arXiv 2408.15664). With
        `"proportional"` it is the part of balance_rate by which the expert's mean load of some steps is off: no noise
        where the load is even, which with thousands of experts a step's load never is.

        Only differences of bias matter, so the mean move is taken out: an expert that was away meets no drift. A
        forward on another thread sees each bias before or after the move, and either is a valid selection.
        """
        live_E = torch.ones_like(self.bias_E, dtype=torch.bool) if live_E is None else live_E.to(self.bias_E.device)
        if not live_E.any():
            return
        move_N = self.balance_rate * self._lack(load_E.to(self.bias_E), live_E)
        self.bias_E[live_E] += move_N - move_N.mean()

    def _lack(self, load_E: Tensor, live_E: Tensor) -> Tensor:
        """How much less than the mean each live expert has, from -1 to 1."""
        if self.balance == "sign":
            load_N = load_E[live_E]
            return torch.sign(load_N.mean() - load_N)
        if not bool(self.mean_load_E.any()):
            self.mean_load_E.copy_(load_E)
        self.mean_load_E.lerp_(load_E, 1 - LOAD_MEMORY)
        mean_N = self.mean_load_E[live_E]
        return (1 - mean_N / mean_N.mean().clamp(min=torch.finfo(mean_N.dtype).tiny)).clamp(-1, 1)

    def observe(self, chosen: ChoiceSummary, live_E: Tensor | None = None) -> None:
        """Count what one optimizer step's forwards chose in the statistics."""
        self._window.observe(chosen, live_E)

    def stats(self) -> GateStats:
        """Statistics over the recent steps that were observed."""
        return replace(self._window.stats(), kept_fraction=self.kept_fraction)

    def _capacity(self, n_tokens: int, live_E: Tensor | None) -> int | None:
        if not self.training or self.capacity_factor <= 0:
            return None
        n_live = self.n_experts if live_E is None else int(live_E.sum())
        return math.ceil(self.capacity_factor * n_tokens * self.experts_per_token / max(1, n_live))

    def _check(self, x_TD: Tensor, live_E: Tensor | None) -> None:
        by_head = (self.n_heads,) if x_TD.dim() == HEADS_DIMS else ()
        if x_TD.dim() < MATRIX_DIMS or x_TD.shape[1:] != (*by_head, self.d_model):
            raise InvalidInputError("x_TD", f"has shape {tuple(x_TD.shape)}; this gate takes (tokens, {self.d_model})")
        if live_E is not None and (live_E.dtype != torch.bool or live_E.shape != (self.n_experts,)):
            shape = tuple(live_E.shape)
            raise InvalidInputError("live_E", f"is {live_E.dtype} {shape}; this gate takes bool ({self.n_experts},)")


def allot(ids_TK: Tensor, log_scores_TK: Tensor, n_experts: int, capacity: int | None) -> GateOutput:
    """Turn chosen ids and the logarithms of scores into weights, dropping what is over `capacity` pairs per expert."""
    chosen_TK = ids_TK != NO_EXPERT
    load_E = torch.bincount(ids_TK[chosen_TK], minlength=n_experts)
    weights_TK = normalised_weights(log_scores_TK, chosen_TK)
    if capacity is None or int(load_E.max()) <= capacity:
        return GateOutput(expert_ids_TK=ids_TK, weights_TK=weights_TK, load_E=load_E, overflow=0)
    kept_TK = chosen_TK & within_capacity(ids_TK, weights_TK.detach(), capacity)
    return GateOutput(
        expert_ids_TK=ids_TK.masked_fill(~kept_TK, NO_EXPERT),
        weights_TK=normalised_weights(log_scores_TK, kept_TK),
        load_E=load_E,
        overflow=int(load_E.sum() - kept_TK.sum()),
    )


def normalised_weights(log_scores_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """Score / sum over the chosen of the token, [T, K].

    Written as a softmax of logarithms, which is the same number without 0/0 when every score underflows; and with
    the lowest finite number rather than -inf, so that a token without experts has neither NaN weights nor NaN gradient.
    """
    lowest = torch.finfo(log_scores_TK.dtype).min
    return torch.softmax(log_scores_TK.masked_fill(~chosen_TK, lowest), dim=-1) * chosen_TK


def within_capacity(ids_TK: Tensor, weights_TK: Tensor, capacity: int) -> Tensor:
    """Bool [T, K]: is the pair among the `capacity` heaviest of its expert? Ties go to the earlier token."""
    ids_P = ids_TK.flatten()
    by_weight_P = weights_TK.flatten().argsort(descending=True, stable=True)
    order_P = by_weight_P[ids_P[by_weight_P].argsort(stable=True)]
    sorted_ids_P = ids_P[order_P]
    first_of_expert_P = torch.searchsorted(sorted_ids_P, sorted_ids_P)
    rank_P = torch.arange(len(ids_P), device=ids_P.device) - first_of_expert_P
    kept_P = torch.empty_like(ids_P, dtype=torch.bool)
    kept_P[order_P] = rank_P < capacity
    return kept_P.view_as(ids_TK)
