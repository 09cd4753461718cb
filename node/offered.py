"""An expert that somebody offers: read from bytes that are not believed, and put in an expert's place on this machine.

Beside the path of a step. `node.acceptance` decides by the gains that `window_gains` measures. The present expert and
the offered one are tried in one batch, so that both meet the same trunk and the same answers of all other experts,
while hosts go on training. Both are computed here: a host of the present one could answer badly to make room.
"""

# Shapes: B windows, T tokens of a call, K experts per token, D model width, P tokens for the offered expert.

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.nn import functional

from node.dispatch.plan import Combined
from node.experts.grouped import Groups
from node.experts.kinds import expert_kind
from node.gate import build_gate
from node.moe import MoE
from node.training import build_trunk
from protocol.errors import InvalidInputError, LimitExceededError
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.moe import Experts
    from node.transformer import Transformer
    from protocol.manifest import Manifest

SAFETENSORS_DTYPES = {"fp32": "F32", "fp64": "F64"}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Weights, by name, of or for expert `expert` of layer `layer`."""

    layer: int
    expert: int
    weights: dict[str, torch.Tensor]


def read_offer(data: bytes, layer: int, expert: int, manifest: Manifest) -> Offer:
    """A safetensors file with exactly the parameters of one expert of the run, every number finite.

    Names, types, shapes and length are compared with the manifest before a tensor is made. InvalidInputError names
    what is wrong; LimitExceededError where it is too long.
    """
    model = manifest.model
    if not (0 <= layer < model.n_layers and 0 <= expert < model.experts_per_layer):
        grid = f"{model.n_layers} layers of {model.experts_per_layer} experts"
        raise InvalidInputError("offer.layer, offer.expert", f"are {layer}, {expert}; the run has {grid}")
    header = _header(data)
    header.pop("__metadata__", None)
    wanted = _wanted(manifest)
    if header.keys() != wanted.keys():
        raise InvalidInputError("offer", f"holds other tensors than {', '.join(sorted(wanted))}")
    for name, expected in wanted.items():
        entry = header[name]
        if not isinstance(entry, dict) or {key: entry.get(key) for key in expected} != expected:
            raise InvalidInputError(f"offer.{name}", f"is not {expected['dtype']} of shape {expected['shape']}")
    return Offer(layer=layer, expert=expert, weights=_finite_tensors(data))


def max_offer_bytes(manifest: Manifest) -> int:
    """The longest file that `read_offer` takes."""
    size = DTYPES[manifest.dtype].itemsize
    shapes = expert_kind(manifest.model.expert_kind).shapes(manifest.model).values()
    return LENGTH_BYTES + MAX_HEADER_BYTES + size * sum(torch.Size(shape).numel() for shape in shapes)


def _wanted(manifest: Manifest) -> dict[str, dict[str, Any]]:
    shapes = expert_kind(manifest.model.expert_kind).shapes(manifest.model)
    dtype = SAFETENSORS_DTYPES[manifest.dtype]
    return {name: {"dtype": dtype, "shape": list(shape)} for name, shape in shapes.items()}


def _header(data: bytes) -> dict[str, Any]:
    n = int.from_bytes(data[:LENGTH_BYTES], "little")
    if n > MAX_HEADER_BYTES:
        raise LimitExceededError("offer.header bytes", n, MAX_HEADER_BYTES)
    try:
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + n])
    except (ValueError, RecursionError):
        raise InvalidInputError("offer.header", "is not that of a safetensors file") from None
    if not isinstance(header, dict):
        raise InvalidInputError("offer.header", "is not that of a safetensors file")
    return header


def _finite_tensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InvalidInputError("offer", f"is no safetensors file: {str(error)[:100]}") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"offer.{name}", "holds a number that is not finite")
    return tensors


class Rivals:
    """Experts of a run for batches whose second half repeats the first, which two experts of one place share.

    `present` answers in the first half, `offered` in the second; all others are `experts`' own in both.
    """

    def __init__(self, experts: Experts, present: Offer, offered: Offer, manifest: Manifest) -> None:
        if (present.layer, present.expert) != (offered.layer, offered.expert):
            raise InvalidInputError("offered", "is for another place than the present expert")
        self.run_tokens = experts.run_tokens
        self._experts, self._layer, self._expert = experts, offered.layer, offered.expert
        self._kind = expert_kind(manifest.model.expert_kind)
        self._weights_2 = {
            name: torch.stack((present.weights[name], offered.weights[name])) for name in offered.weights
        }

    def live_experts(self, layer: int) -> torch.Tensor:
        """Those of the run, and the one that is computed here."""
        live_E = self._experts.live_experts(layer)
        if layer == self._layer:
            live_E = live_E.clone()
            live_E[self._expert] = True
        return live_E

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        """Weighted sums: with the present expert's outputs in the first half, with the offered one's in the second."""
        if keep:
            raise InvalidInputError("keep", "is set; an offer is evaluated, not trained")
        if layer != self._layer:
            return self._experts.forward(layer, x_TD, expert_ids_TK, weights_TK, keep=False)
        own_TK = expert_ids_TK == self._expert
        rest = self._experts.forward(layer, x_TD, expert_ids_TK.masked_fill(own_TK, -1), weights_TK, keep=False)
        token_P, slot_P = own_TK.nonzero(as_tuple=True)
        n_present = int((token_P < len(x_TD) // 2).sum())
        groups = Groups.of(torch.tensor([n_present, len(token_P) - n_present]))
        y_PD = self._kind.apply(self._weights_2, x_TD[token_P], groups)
        combined_TD = rest.combined_TD.index_add(0, token_P, y_PD * weights_TK[token_P, slot_P, None])
        return Combined(combined_TD, rest.answered_TK | own_TK, None)

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401, ARG002
        """There is none."""
        raise InvalidInputError("grad_TD", "came for an offer, which is evaluated, not trained")


def rivals_model(manifest: Manifest, trunk: Mapping[str, torch.Tensor], rivals: Rivals) -> Transformer:
    """A copy of the trunk whose state is `trunk`, for `window_gains`: training can go on meanwhile."""
    generator = torch.Generator().manual_seed(0)
    gates = [build_gate(manifest.model, generator) for _ in range(manifest.model.n_layers)]
    layers = [MoE(gate, rivals, layer) for layer, gate in enumerate(gates)]
    model = build_trunk(manifest, layers, generator)
    model.load_state_dict(dict(trunk))
    return model.eval()


@torch.no_grad()
def window_gains(model: Transformer, ids: torch.Tensor) -> list[float]:
    """For each window [B, T + 1] the loss with the present expert less that with the offered one, nats per byte."""
    twice = torch.cat((ids, ids)).to(model.embedding_VD.device)
    logits_NV = model(twice[:, :-1]).flatten(0, 1)
    losses_N = functional.cross_entropy(logits_NV, twice[:, 1:].flatten(), reduction="none")
    present_B, offered_B = losses_N.double().view(2, len(ids), -1).mean(2)
    gains: list[float] = (present_B - offered_B).tolist()
    return gains
