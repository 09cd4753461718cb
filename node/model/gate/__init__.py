"""The gate: scores tokens against experts and picks K of them. Part of `node/model`.

Path of a step: `transformer.py`, `moe.py`, **gate**, then `node/trainer/dispatch/`. `base` says what every gate does,
`heads` what one of several heads does, `topk`, `product_key` and `hashed` how each finds its experts, `stats` what is
measured about what they choose, `probe` how much of it they keep, `watched` shows it to others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import ManifestError
from node.model.gate.base import GATE_BIAS, Gate, GateOutput
from node.model.gate.hashed import HashGate
from node.model.gate.probe import ChoiceProbe
from node.model.gate.product_key import ProductKeyGate
from node.model.gate.stats import ChoiceSummary, GateStats, LoadWindow
from node.model.gate.topk import TopKGate
from node.model.gate.watched import choices_seen, without_experts

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from protocol.manifest import ModelConfig

__all__ = [
    "GATE_BIAS",
    "ChoiceProbe",
    "ChoiceSummary",
    "Gate",
    "GateOutput",
    "GateStats",
    "HashGate",
    "LoadWindow",
    "ProductKeyGate",
    "TopKGate",
    "build_gate",
    "choices_seen",
    "without_experts",
]

_KINDS: dict[str, Callable[[ModelConfig, torch.Generator], Gate]] = {
    "topk": TopKGate,
    "product_key": ProductKeyGate,
    "hash": HashGate,
}


def build_gate(model: ModelConfig, generator: torch.Generator) -> Gate:
    """The gate that the manifest names, in float32 on the CPU; the same generator state gives the same parameters."""
    if model.gate not in _KINDS:
        raise ManifestError(f"model.gate: is {model.gate!r}, must be one of {', '.join(_KINDS)}")
    return _KINDS[model.gate](model, generator)
