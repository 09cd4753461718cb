"""Expert kinds: what one expert computes. A new one is a class here, its row in `_KINDS`, its name in the manifest.

A kind brings its own gradients: they are fewer products than autograd's, and none is kept that nobody asks for.
Shapes: G experts, R rows of each, D model width, H expert width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.nn import functional

from common.errors import ManifestError

if TYPE_CHECKING:
    from protocol.manifest import ModelConfig

    Params = dict[str, torch.Tensor]


class PairGradients(NamedTuple):
    """Gradients of the inputs, of the pairs' weights, and of each parameter of the G experts, stacked."""

    inputs_GRD: torch.Tensor
    weight_GR: torch.Tensor
    params: dict[str, torch.Tensor]


class ExpertKind(Protocol):
    """Stateless arithmetic of a kind; the weights of G experts come stacked, by name."""

    def shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one expert."""

    def init_std(self, model: ModelConfig) -> dict[str, float]:
        """Standard deviation of each parameter's normal initialisation."""

    def apply(self, params: Params, x_GRD: torch.Tensor) -> torch.Tensor:
        """Outputs [G, R, D] of each expert for its rows."""

    def differentiate(
        self, params: Params, x_GRD: torch.Tensor, grad_GRD: torch.Tensor, weight_GR: torch.Tensor
    ) -> PairGradients:
        """Gradients of the sum over rows of `weight_GR * (grad_GRD * apply(...)).sum(2)`."""


class FfnKind:
    """D-H-D feed-forward with GELU and no biases; H may be 1 (a single neuron, as in PEER, arXiv 2407.04153)."""

    def shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """`w_in` [D, H] and `w_out` [H, D]."""
        d_model, hidden = model.d_model, model.expert_hidden
        return {"w_in": (d_model, hidden), "w_out": (hidden, d_model)}

    def init_std(self, model: ModelConfig) -> dict[str, float]:
        """Unit variance through both products."""
        return {"w_in": model.d_model**-0.5, "w_out": model.expert_hidden**-0.5}

    def apply(self, params: Params, x_GRD: torch.Tensor) -> torch.Tensor:
        """`w_out(gelu(w_in(x)))` of each expert."""
        h_GRH = functional.gelu(torch.bmm(x_GRD, params["w_in"]))
        return torch.bmm(h_GRH, params["w_out"])

    def differentiate(
        self, params: Params, x_GRD: torch.Tensor, grad_GRD: torch.Tensor, weight_GR: torch.Tensor
    ) -> PairGradients:
        """Five products: the outputs themselves are not needed, as `grad . (h w_out)` is `(grad w_out^T) . h`."""
        w_in, w_out = params["w_in"], params["w_out"]
        a_GRH = torch.bmm(x_GRD, w_in)
        h_GRH = functional.gelu(a_GRH)
        grad_h_GRH = torch.bmm(grad_GRD, w_out.mT)
        weight_grad_GR = torch.linalg.vecdot(grad_h_GRH, h_GRH)
        grad_a_GRH = torch.ops.aten.gelu_backward(grad_h_GRH.mul_(weight_GR[:, :, None]), a_GRH)
        return PairGradients(
            inputs_GRD=torch.bmm(grad_a_GRH, w_in.mT),
            weight_GR=weight_grad_GR,
            params={
                "w_in": torch.bmm(x_GRD.mT, grad_a_GRH),
                "w_out": torch.bmm(h_GRH.mul_(weight_GR[:, :, None]).mT, grad_GRD),
            },
        )


class LoraKind:
    """Rank-r adapter, r = `expert_hidden`: linear, D-r-D, to be added to what a frozen layer gives (arXiv 2106.09685).

    `w_out` starts at zero, so that whatever the adapters are put around is unchanged until they learn.
    """

    def shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """`w_in` [D, r] and `w_out` [r, D]."""
        d_model, rank = model.d_model, model.expert_hidden
        return {"w_in": (d_model, rank), "w_out": (rank, d_model)}

    def init_std(self, model: ModelConfig) -> dict[str, float]:
        """Unit variance into the rank, and nothing out of it."""
        return {"w_in": model.d_model**-0.5, "w_out": 0.0}

    def apply(self, params: Params, x_GRD: torch.Tensor) -> torch.Tensor:
        """`w_out(w_in(x))` of each expert."""
        return torch.bmm(torch.bmm(x_GRD, params["w_in"]), params["w_out"])

    def differentiate(
        self, params: Params, x_GRD: torch.Tensor, grad_GRD: torch.Tensor, weight_GR: torch.Tensor
    ) -> PairGradients:
        """Five products, as for `ffn`; the activation between them is the identity."""
        w_in, w_out = params["w_in"], params["w_out"]
        h_GRH = torch.bmm(x_GRD, w_in)
        grad_h_GRH = torch.bmm(grad_GRD, w_out.mT)
        weight_grad_GR = torch.linalg.vecdot(grad_h_GRH, h_GRH)
        grad_h_GRH.mul_(weight_GR[:, :, None])
        return PairGradients(
            inputs_GRD=torch.bmm(grad_h_GRH, w_in.mT),
            weight_GR=weight_grad_GR,
            params={
                "w_in": torch.bmm(x_GRD.mT, grad_h_GRH),
                "w_out": torch.bmm(h_GRH.mul_(weight_GR[:, :, None]).mT, grad_GRD),
            },
        )


_KINDS: dict[str, ExpertKind] = {"ffn": FfnKind(), "lora": LoraKind()}


def expert_kind(name: str) -> ExpertKind:
    """Kind by its name in the manifest."""
    if name not in _KINDS:
        raise ManifestError(f"model.expert_kind: {name!r} is not known here; known: {', '.join(_KINDS)}")
    return _KINDS[name]


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of all experts of all layers."""
    per_expert = sum(math.prod(shape) for shape in expert_kind(model.expert_kind).shapes(model).values())
    return per_expert * model.experts_per_layer * model.n_layers
