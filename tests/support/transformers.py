"""The trunk of a run that has none that was pretrained, as what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from node.trainer.train_step import build_model

if TYPE_CHECKING:
    import torch

    from node.model.moe import Experts
    from node.model.transformer import Transformer
    from protocol.manifest import Manifest


def transformer_of(manifest: Manifest, experts: Experts, generator: torch.Generator) -> Transformer:
    """As `build_model` makes it."""
    return cast("Transformer", build_model(manifest, experts, generator))
