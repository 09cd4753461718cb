"""What a token is, before any layer has read it: the tokens before it mixed into the trunk's input, and fixed codes.

Path of a step: data -> **transformer** -> gate -> dispatch -> hosts, and back.
"""

# Shapes: B sequences, T positions of a sequence, N = B * T tokens, D d_model, V token values, J tokens back, Q heads.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protocol.manifest import ModelConfig

DECAY = 0.7
"""How much less a token counts at the start than the one after it."""


def first_weights(n_back: int, width: int, generator: torch.Generator) -> Tensor:
    """Weights [J, D] of the tokens before: DECAY ** j with random signs, so that their order can be told from a sum."""
    signs_JD = torch.randint(0, 2, (n_back, width), generator=generator) * 2.0 - 1.0
    return signs_JD * DECAY ** torch.arange(1, n_back + 1)[:, None]


def smears(x_BTD: Tensor, weights_JD: Tensor) -> Iterator[Tensor]:
    """Each position's vector; the same plus that of the position before it, times its weights; and so on, J + 1 in all.

    From before the first position comes nothing.
    """
    mixed_BTD = x_BTD
    yield mixed_BTD
    for back, weight_D in enumerate(weights_JD, start=1):
        mixed_BTD = mixed_BTD + weight_D * F.pad(x_BTD, (0, 0, back, 0))[:, : x_BTD.shape[1]]
        yield mixed_BTD


class TokenCodes(nn.Module):
    """Codes of the last tokens, one for each head of a gate, drawn at the start and never trained.

    The first is of a token alone, the second of it and the one before it, and so on: what follows a long context that
    was seen before is best known by it, and what follows a new one by its end.

    A gate that reads codes meets the same token with the same input for the whole of training, so that what it has
    learnt to choose stays chosen: hash layers (arXiv 2106.04426) whose hash is learnt. The codes come from the
    generator of the run's seed, so that every trainer has the same; they are in no checkpoint.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        code_VD = torch.randn(model.vocab_size, model.d_model, generator=generator)
        self.register_buffer("code_VD", code_VD, persistent=False)
        weights_JD = first_weights(model.gate_heads - 1, model.d_model, generator)
        self.register_buffer("weights_JD", weights_JD, persistent=False)
        self.code_VD: Tensor
        self.weights_JD: Tensor

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Codes [N, Q, D] of root mean square 1."""
        code_BTD = F.embedding(ids_BT, self.code_VD)
        code_BTQD = torch.stack(list(smears(code_BTD, self.weights_JD)), 2)
        return F.rms_norm(code_BTQD, code_BTQD.shape[-1:]).flatten(0, 1)
