"""Text from the model: the end of a run and `run_node.py sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from node.model.transformer import Transformer

SAMPLE_BYTES = 200
SAMPLE_PROMPT = b"The "


def sample_text(model: Transformer, prompt: bytes, n_bytes: int, temperature: float, seed: int) -> str:
    """Prompt and continuation; bytes that are not UTF-8 become replacement characters."""
    generator = torch.Generator().manual_seed(seed)
    return (prompt + model.generate(prompt, n_bytes, temperature, generator)).decode("utf-8", errors="replace")
