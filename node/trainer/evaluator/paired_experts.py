"""An offered expert beside the present one: both in one batch, on a copy of the trunk, so that both meet the same.

All others are the run's own, as they answer at that moment, in one call for both. The two are computed here: a host of
the present one could answer badly for it, to make room for a friend's.
"""

# Shapes: B windows, T tokens of a call, K experts per token, D model width, P tokens for the two experts, N = 2 B T.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from common.errors import InvalidInputError
from node.model.experts.kinds import expert_kind
from node.model.pairs import NO_EXPERT, Combined
from node.trainer.train_step import build_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.model.expert_file import ExpertId, Weights
    from node.model.moe import Experts
    from node.model.trunk import Trunk
    from protocol.manifest import Manifest


class PairedExperts:
    """Experts of a run for batches whose second half repeats the first, which two experts of one place share.

    `present` answers in the first half, `offered` in the second; all others are `experts`' own in both.
    """

    def __init__(
        self, experts: Experts, place: ExpertId, present: Weights, offered: Weights, manifest: Manifest
    ) -> None:
        self.run_tokens = experts.run_tokens
        self._experts, self._place = experts, place
        self._kind = expert_kind(manifest.model.expert_kind)
        self._weights_2 = {name: torch.stack((present[name], offered[name])) for name in offered}

    def live_experts(self, layer: int) -> torch.Tensor:
        """Return the live experts of the run, and the one that is computed here."""
        return self._place.made_live(layer, self._experts.live_experts(layer))

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Weighted sums: with the present expert's outputs in the first half, with the offered one's in the second."""
        if keep:
            raise InvalidInputError("keep", "is set; an offer is evaluated, not trained")
        if layer > self._place.layer:
            return self._experts.forward(layer, x_TD, expert_ids_TK, weights_TK, keep=False)
        own_TK = (expert_ids_TK == self._place.expert) & (layer == self._place.layer)
        # Up to here the halves are equal. Asked once, nobody can answer better for one of them.
        half, others_TK = len(x_TD) // 2, expert_ids_TK.masked_fill(own_TK, NO_EXPERT)
        rest = self._experts.forward(layer, x_TD[:half], others_TK[:half], weights_TK[:half], keep=False)
        combined_TD = rest.combined_TD.to(x_TD.device).repeat(2, 1)
        answered_TK = rest.answered_TK.to(x_TD.device).repeat(2, 1)
        token_P, slot_P = own_TK.nonzero(as_tuple=True)
        y_PD = self._both(x_TD[token_P], int((token_P < half).sum()))
        combined_TD.index_add_(0, token_P, y_PD * weights_TK[token_P, slot_P, None])
        return Combined(combined_TD, answered_TK | own_TK, None)

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401, ARG002
        """There is none."""
        raise InvalidInputError("grad_TD", "came for an offer, which is evaluated, not trained")

    def _both(self, x_PD: torch.Tensor, n_present: int) -> torch.Tensor:
        rows = x_PD.split([n_present, len(x_PD) - n_present])
        weights_2 = {name: w.to(x_PD.device).split(1) for name, w in self._weights_2.items()}
        each = ({name: w[index] for name, w in weights_2.items()} for index in range(2))
        return torch.cat([self._kind.apply(w, of[None])[0] for w, of in zip(each, rows, strict=True)])


def paired_experts_model(manifest: Manifest, trunk: Mapping[str, torch.Tensor], paired_experts: PairedExperts) -> Trunk:
    """A trunk of its own whose state is `trunk`, for `window_gains`: training goes on meanwhile."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(manifest, paired_experts, generator)
    model.load_state_dict(dict(trunk))
    return model.to(next(iter(trunk.values())).device).eval()


@torch.no_grad()
def window_gains(model: Trunk, ids: torch.Tensor) -> list[float]:
    """Return each window's [B, T + 1] gain: the present expert's loss less the offered one's, nats per token."""
    twice = torch.cat((ids, ids)).to(model.device)
    logits_NV = model(twice[:, :-1]).flatten(0, 1)
    losses_N = functional.cross_entropy(logits_NV, twice[:, 1:].flatten(), reduction="none")
    present_B, offered_B = losses_N.double().view(2, len(ids), -1).mean(2)
    gains: list[float] = (present_B - offered_B).tolist()
    return gains
