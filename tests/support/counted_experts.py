"""Experts in this process that count what they are called with, and that are too few at a call that a test names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common.errors import TooFewExpertsError
from node.model.moe import LocalExperts
from node.trainer.train_step import build_transformer
from protocol.run_assets import DataConfig
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from common.tokenizer import Tokenizer
    from node.model.pairs import Combined
    from node.model.transformer import Transformer
    from protocol.manifest import Dtype, Manifest


class CountedExperts(LocalExperts):
    """`calls` are (layer, tokens) in their order; those whose numbers are in `failing` find no expert."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.calls: list[tuple[int, int]] = []
        self.failing: set[int] = set()

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        self.calls.append((layer, len(x_TD)))
        if len(self.calls) - 1 in self.failing:
            raise TooFewExpertsError(f"layer {layer}: none of its 16 experts has a live replica")
        return super().forward(layer, x_TD, expert_ids_TK, weights_TK, keep=keep)


def counted_model(
    dtype: Dtype = "fp64", tokenizer: Tokenizer | None = None, **changes: Any
) -> tuple[Transformer, CountedExperts]:
    """A small model in evaluation mode, no weight of which is where it started: norms, for one, are not all ones."""
    data = DataConfig()
    if tokenizer is not None and tokenizer.name != data.tokenizer:
        data = DataConfig(tokenizer=tokenizer.name, tokenizer_bytes=1)
        changes["vocab_size"] = tokenizer.vocab_size
    experts = CountedExperts(small_manifest(dtype=dtype, codec=dtype, model=changes, data=data))
    generator = torch.Generator().manual_seed(3)
    model = build_transformer(experts.manifest, experts, generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model, experts
