"""Experts that are counted on: what became of the pairs of tokens and experts that a gate chose.

Shapes: T tokens, K experts per token, D model width.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from common.errors import UnavailableError
from node.model.pairs import NO_EXPERT, Combined

if TYPE_CHECKING:
    import torch

    from node.model.moe import Experts


class CountedExperts:
    """`experts`, watched. Safe to call from several threads, as those are.

    `trained` and `held_out` count, of passes with a backward and without: `chosen` pairs, those `answered`, and those
    `returned`, whose gradient came back; and `experts`, over all passes, with how many of them were `live`.
    """

    def __init__(self, experts: Experts) -> None:
        self._experts, self._lock = experts, threading.Lock()
        self.trained, self.held_out = Counter[str](), Counter[str]()

    @property
    def run_tokens(self) -> int:
        """The value of the experts that are counted."""
        return self._experts.run_tokens

    @run_tokens.setter
    def run_tokens(self, tokens: int) -> None:
        self._experts.run_tokens = tokens

    def check_held_out(self) -> None:
        """Raises UnavailableError if an expert was missing in a pass without a backward: no loss of the model's own."""
        met = self.held_out
        if met["answered"] < met["chosen"] or met["live"] < met["experts"]:
            raise UnavailableError(f"experts were missing in the last evaluation: {dict(met)}; run the trial again")

    def live_experts(self, layer: int) -> torch.Tensor:
        """The value of the experts that are counted."""
        return self._experts.live_experts(layer)

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Count what was chosen and what of it was answered; a pass that found too few experts counts in neither."""
        live_E = self._experts.live_experts(layer)
        found = self._experts.forward(layer, x_TD, expert_ids_TK, weights_TK, keep=keep)
        counts = {
            "chosen": int((expert_ids_TK != NO_EXPERT).sum()),
            "answered": int(found.answered_TK.sum()),
            "experts": len(live_E),
            "live": int(live_E.sum()),
        }
        with self._lock:
            (self.trained if keep else self.held_out).update(counts)
        return Combined(found.combined_TD, found.answered_TK, (found.ticket, found.answered_TK))

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        """Count the pairs whose gradient came back: that of a pair that was lost on its way back is exactly 0."""
        theirs, answered_TK = ticket
        grad_x_TD, grad_weight = self._experts.backward(theirs, grad_TD)
        returned = int((grad_weight[answered_TK.reshape(-1)] != 0).sum())
        with self._lock:
            self.trained["returned"] += returned
        return grad_x_TD, grad_weight
