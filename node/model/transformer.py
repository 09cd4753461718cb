"""The trunk: a transformer whose feed-forward layers are mixture-of-experts layers given from outside.

Path of a step: data -> **transformer** -> gate -> dispatch -> hosts, and back. Nothing in this file knows whether an
MoE layer is in this process (LocalMoE), on other peers (RemoteMoE) or dense (DenseFfn): each maps tokens x_ND -> y_ND.

Forward changes no module state, so several micro-batches may run it, and its backward, at once from several threads.
"""

# Shapes: B sequences, T positions of a sequence, N = B * T tokens (what gate and dispatch call T), D d_model,
#         V tokens of the vocabulary, A attention heads, C = D / A channels of a head, H hidden width of DenseFfn.

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

from common.errors import InvalidInputError, ManifestError
from node.model.attention_cache import AttentionCache, bytes_per_sequence, read
from node.model.rope import rope_rotation, rotate
from node.model.token_codes import TokenCodes, first_weights, smeared
from node.model.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.model.attention_cache import Stretch
    from protocol.manifest import ModelConfig

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

NORM_EPS = 1e-6
EMBEDDING_STD = 1.0
HEAD_STD = 0.02
MATRIX_DIMS = 2


def bits_per_byte(loss_nats: float, bytes_per_token: float = 1.0) -> float:
    """Mean cross-entropy in nats per token, as bits per byte of the text that the tokens stand for."""
    return loss_nats / math.log(2.0) / bytes_per_token


def normal_parameter(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn on the CPU in float32, so that one seed gives the same start on every device and dtype."""
    return nn.Parameter(torch.randn(shape, generator=generator) * std)


def attend_to_earlier(query_BATC: Tensor, key_BATC: Tensor, value_BATC: Tensor) -> Tensor:
    """Mix values [B, A, T, C] for queries of the same T positions; position t sees positions 0..t."""
    return F.scaled_dot_product_attention(query_BATC, key_BATC, value_BATC, is_causal=True)


class CausalAttention(nn.Module):
    """Multi-head attention over the past with rotary positions; queries and keys are RMS-normalised per head.

    The normalisation (arXiv 2010.04245) keeps attention logits bounded, which lets a short run use a high rate.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        width = model.d_model
        self.n_heads = model.n_heads
        self.qkv_weight = normal_parameter((3 * width, width), width**-0.5, generator)
        self.out_weight = normal_parameter((width, width), (2 * model.n_layers * width) ** -0.5, generator)
        self.query_norm = nn.RMSNorm(width // model.n_heads, eps=NORM_EPS)
        self.key_norm = nn.RMSNorm(width // model.n_heads, eps=NORM_EPS)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend = attend_to_earlier) -> Tensor:
        """x_BTD -> [B, T, D]; `attend` says what a position sees. It gets queries and keys after their rotation."""
        heads = F.linear(x_BTD, self.qkv_weight).view(*x_BTD.shape[:2], 3, self.n_heads, -1)
        query_BATC, key_BATC, value_BATC = heads.permute(2, 0, 3, 1, 4)
        mixed_BATC = attend(
            rotate(self.query_norm(query_BATC), rotation),
            rotate(self.key_norm(key_BATC), rotation),
            value_BATC,
        )
        return F.linear(mixed_BATC.transpose(1, 2).flatten(2), self.out_weight)


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: attention, then whatever maps tokens x_ND -> y_ND."""

    def __init__(self, model: ModelConfig, moe: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.d_model, eps=NORM_EPS)
        self.attention = CausalAttention(model, generator)
        self.moe_norm = nn.RMSNorm(model.d_model, eps=NORM_EPS)
        self.moe = moe

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        code_NQD: Tensor | None = None,
        attend: Attend = attend_to_earlier,
    ) -> Tensor:
        """x_BTD -> [B, T, D]; `code_NQD` is what each of the gate's heads reads where they do not read x."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, attend)
        x_ND = self.moe_norm(x_BTD).flatten(0, 1)
        y_ND: Tensor = self.moe(x_ND) if code_NQD is None else self.moe(x_ND, code_NQD)
        return x_BTD + y_ND.view_as(x_BTD)


class Transformer(Trunk):
    """Tokens in, logits of the next token out.

    `moe_layers[i]` becomes the feed-forward part of layer i and a sub-module: its parameters are in `parameters()`.
    Parameters start in float32; `.to(torch.float64)` gives the same start for a parity check.
    """

    def __init__(self, model: ModelConfig, moe_layers: Sequence[nn.Module], generator: torch.Generator) -> None:
        super().__init__()
        _check_shape(model, len(moe_layers))
        self.context, self.vocab_size = model.context, model.vocab_size
        self.channels = model.d_model // model.n_heads
        self.moe_layers = tuple(moe_layers)
        self.embedding_VD = normal_parameter((model.vocab_size, model.d_model), EMBEDDING_STD, generator)
        self.layers = nn.ModuleList(TransformerLayer(model, moe, generator) for moe in moe_layers)
        self.final_norm = nn.RMSNorm(model.d_model, eps=NORM_EPS)
        self.head_VD = normal_parameter((model.vocab_size, model.d_model), HEAD_STD, generator)
        weights_JD = first_weights(model.smear, model.d_model, generator)
        self.smear_JD = nn.Parameter(weights_JD) if model.smear else None
        self.codes = TokenCodes(model, generator) if model.gate_reads == "tokens" else None

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Integer ids_BT in [0, V), T <= context -> logits_BTV. InvalidInputError when T does not fit the context."""
        if ids_BT.dim() != MATRIX_DIMS or not 0 < ids_BT.shape[1] <= self.context:
            shape = tuple(ids_BT.shape)
            raise InvalidInputError("ids_BT", f"has shape {shape}; it takes (sequences, 1 to {self.context} tokens)")
        x_BTD, code_NQD = self.embedded(ids_BT.long())
        rotation = rope_rotation(ids_BT.shape[1], self.channels, x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation, code_NQD)
        return self.logits(x_BTD)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding_VD.device

    @property
    def n_back(self) -> int:
        """How many tokens before a position's own what `embedded` gives for it is of."""
        smear = 0 if self.smear_JD is None else len(self.smear_JD)
        return max(smear, 0 if self.codes is None else self.codes.n_back)

    def embedded(self, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first layer reads [B, T, D], and the codes [N, Q, D] that gates choose by, None if by x itself."""
        x_BTD = F.embedding(ids_BT, self.embedding_VD)
        x_BTD = x_BTD if self.smear_JD is None else smeared(x_BTD, self.smear_JD)
        return x_BTD, None if self.codes is None else self.codes(ids_BT)

    def new_cache(self, n_places: int, n_positions: int) -> AttentionCache:
        """Room for what is read of so many sequences, all of it free; LimitExceededError for too many."""
        return AttentionCache(self, n_places, n_positions, n_sequences=0)

    def bytes_per_sequence(self, n_positions: int) -> int:
        """What the keys and values of one window of so many tokens take."""
        return bytes_per_sequence(self, n_positions)

    def read(self, cache: AttentionCache, stretches: Sequence[Stretch]) -> Tensor:
        """Read stretches of sequences whose earlier tokens are in `cache`; see `attention_cache.read`."""
        return read(self, cache, stretches)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [..., V] of what the last layer gave [..., D]."""
        return F.linear(self.final_norm(x_BTD), self.head_VD)


class DenseFfn(nn.Module):
    """D-H-D with GELU over every token: an MoE layer's interface without experts, for tests and as a dense arm."""

    def __init__(self, d_model: int, d_hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.in_weight = normal_parameter((d_hidden, d_model), d_model**-0.5, generator)
        self.in_bias = nn.Parameter(torch.zeros(d_hidden))
        self.out_weight = normal_parameter((d_model, d_hidden), d_hidden**-0.5, generator)
        self.out_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        return F.linear(F.gelu(F.linear(x_ND, self.in_weight, self.in_bias)), self.out_weight, self.out_bias)


def _check_shape(model: ModelConfig, n_given: int) -> None:
    if model.d_model % (2 * model.n_heads):
        raise ManifestError(
            f"model.d_model = {model.d_model} must be a multiple of 2 * n_heads = {2 * model.n_heads}, because rotary "
            "positions turn pairs of channels within a head: change d_model or n_heads."
        )
    if n_given != model.n_layers:
        raise InvalidInputError("moe_layers", f"holds {n_given} layers; the manifest says n_layers = {model.n_layers}")
