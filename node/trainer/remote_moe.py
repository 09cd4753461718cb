"""The MoE layer whose experts live on other peers: what a researcher's model holds, and what a trainer trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.model.gate import build_gate
from node.model.moe import MoE

if TYPE_CHECKING:
    import torch

    from node.trainer.dispatch.dispatcher import Dispatcher
    from protocol.manifest import ModelConfig


class RemoteMoE(MoE):
    """MoE layer `layer` of a run whose experts live on other peers, with the run's gate or that of `model`."""

    def __init__(
        self, dispatcher: Dispatcher, layer: int, generator: torch.Generator, model: ModelConfig | None = None
    ) -> None:
        super().__init__(build_gate(model or dispatcher.manifest.model, generator), dispatcher, layer)
