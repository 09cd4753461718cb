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
    from protocol.manifest import ModelConfig

DECAY = 0.7
"""How much less a token counts at the start than the one after it."""


def first_weights(n_back: int, width: int, generator: torch.Generator) -> Tensor:
    """Weights [J, D] of the tokens before: DECAY ** j with random signs, so that their order can be told from a sum."""
    signs_JD = torch.randint(0, 2, (n_back, width), generator=generator) * 2.0 - 1.0
    return signs_JD * DECAY ** torch.arange(1, n_back + 1)[:, None]


def smeared(x_BTD: Tensor, weights_JD: Tensor) -> Tensor:
    """Each position's vector plus those of the J positions before it, each times its weights; nothing from before 0."""
    mixed_BTD = x_BTD
    for back, weight_D in enumerate(weights_JD, start=1):
        mixed_BTD = mixed_BTD + weight_D * F.pad(x_BTD, (0, 0, back, 0))[:, : x_BTD.shape[1]]
    return mixed_BTD


class TokenCodes(nn.Module):
    """Codes of the last tokens, one for each head of a gate, drawn at the start and never trained.

    The first is of the last `gate_shortest` tokens, the second of one more, and so on: what follows a long context that
    was seen before is best known by it, and what follows a new one by its end. A gate that reads codes meets the
    same tokens with the same input for the whole of training, so that what it has learnt to choose stays chosen: hash
    layers (arXiv 2106.04426) whose hash is learnt.

    Each token has random signs; several are bound by multiplying theirs, each turned by its distance ("Multiplicative
    Binding, Representation Operators & Analogy", Gayler, 1998). Codes of two different contexts are as different as
    random ones, however much of them is alike: sums, which are not, chose worse. All come from the generator of the
    run's seed, so that every trainer has the same, and are in no checkpoint.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self._lengths = range(model.gate_shortest, model.gate_shortest + model.gate_heads)
        signs_VD = torch.randint(0, 2, (model.vocab_size, model.d_model), generator=generator) * 2.0 - 1.0
        self.register_buffer("signs_VD", signs_VD, persistent=False)
        self.signs_VD: Tensor

    @property
    def n_back(self) -> int:
        """How many tokens before a position's own its longest code is of."""
        return self._lengths.stop - 2

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Codes [N, Q, D] of ones and minus ones. Before the first position nothing is bound."""
        sign_BTD = code_BTD = F.embedding(ids_BT, self.signs_VD)
        codes = [code_BTD]
        for back in range(1, self.n_back + 1):
            earlier_BTD = F.pad(sign_BTD, (0, 0, back, 0), value=1.0)[:, : ids_BT.shape[1]]
            code_BTD = code_BTD * earlier_BTD.roll(back, dims=2)
            codes.append(code_BTD)
        return torch.stack(codes[self._lengths.start - 1 :], 2).flatten(0, 1)
