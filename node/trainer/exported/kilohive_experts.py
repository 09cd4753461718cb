"""The experts that a Kilohive swarm has trained, beside any layer that calls them. For transformers.

A token's experts are chosen and weighed as in the swarm when all of its experts are live. It is for inference:
gradients flow, but nothing here balances the load of the experts or drops what is over an expert's capacity.
"""

# Shapes: B sequences, S positions of what was read and is new, T new positions, N tokens, D width, V token values,
#         J tokens back (0 is the token itself), Q heads of the gate, K experts of a token, G experts of a product,
#         R rows, P = N * K pairs.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .kilohive_gates import GATES, KilohiveGate, weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.cache_utils import Cache

NOTHING = -1
"""Stands in place of a token's id where no token is."""

GATE_TOKENS = 1024
"""The gate scores so many tokens at once, which bounds its memory."""


class KilohiveExpertsConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its base is not annotated throughout
    """The experts' shape, and how a token's experts are chosen."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_experts: int = 512
    num_experts_per_tok: int = 4
    experts_per_block: int = 32
    expert_kind: str = "ffn"
    expert_hidden: int = 32
    gate: str = "topk"
    gate_reads: str = "hidden"
    gate_heads: int = 1
    gate_shortest: int = 2
    gate_score: str = "sigmoid"
    gate_strides: int = 0
    kilohive: dict[str, Any] | None = None


class KilohiveMoE(nn.Module):
    """The weighted sum of each token's experts. All are here, so none's share goes to the others."""

    def __init__(self, config: KilohiveExpertsConfig) -> None:
        super().__init__()
        self.n_heads = config.gate_heads
        self.gate: KilohiveGate = GATES[config.gate](config)
        starts = range(0, config.num_experts, config.experts_per_block)
        blocks = [range(start, min(start + config.experts_per_block, config.num_experts)) for start in starts]
        self.experts = nn.ModuleList(KilohiveBlock(config, experts) for experts in blocks)

    def forward(self, x_ND: Tensor, code_NQD: Tensor | None) -> Tensor:
        """x_ND -> y_ND; the gate chooses by the codes if there are any."""
        read_NQD = x_ND[:, None].expand(-1, self.n_heads, -1) if code_NQD is None else code_NQD
        parts = [self.gate(part_NQD) for part_NQD in read_NQD.split(GATE_TOKENS)]
        ids_NK, weights_NK = (torch.cat(each) for each in zip(*parts, strict=True))
        pairs = KilohivePairs(ids_NK, weights_NK.to(x_ND.dtype))
        y_ND = torch.zeros_like(x_ND)
        for block in self.experts:
            y_ND = block(x_ND, y_ND, pairs)
        return y_ND


class KilohivePairs:
    """A layer's (token, expert, weight) pairs, sorted by expert."""

    def __init__(self, ids_NK: Tensor, weights_NK: Tensor) -> None:
        expert_P, place_P = ids_NK.flatten().sort(stable=True)
        self.token_P, self.weight_P = place_P // ids_NK.shape[1], weights_NK.flatten()[place_P]
        self._expert_G, self._count_G = torch.unique_consecutive(expert_P, return_counts=True)
        self._start_G = self._count_G.cumsum(0) - self._count_G

    def of(self, experts: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some experts at a time, [G]; places [G, R] of their pairs, as many for each; which of these are real.

        Experts whose numbers of pairs round up to the same power of two are taken together.
        """
        own_G = (self._expert_G >= experts.start) & (self._expert_G < experts.stop)
        expert_G, count_G, start_G = (t[own_G] for t in (self._expert_G, self._count_G, self._start_G))
        rows_G = 2 ** ((count_G - 0.5).log2().floor().long() + 1)
        for rows in rows_G.unique().tolist():
            chosen_G = rows_G == rows
            row_R = torch.arange(rows, device=count_G.device)
            real_GR = row_R < count_G[chosen_G, None]
            yield expert_G[chosen_G], start_G[chosen_G, None] + row_R * real_GR, real_GR


class KilohiveBlock(nn.Module):
    """Some experts of a layer, stacked: D-H-D without biases, with GELU between (`ffn`) or nothing (`lora`)."""

    def __init__(self, config: KilohiveExpertsConfig, experts: range) -> None:
        super().__init__()
        self.of, self.is_linear = experts, config.expert_kind == "lora"
        self.w_in = weight(len(experts), config.hidden_size, config.expert_hidden)
        self.w_out = weight(len(experts), config.expert_hidden, config.hidden_size)

    def forward(self, x_ND: Tensor, y_ND: Tensor, pairs: KilohivePairs) -> Tensor:
        """`y_ND` plus what these experts add to it."""
        for expert_G, place_GR, real_GR in pairs.of(self.of):
            token_GR, own_G = pairs.token_P[place_GR], expert_G - self.of.start
            hidden_GRH = torch.bmm(x_ND[token_GR], self.w_in[own_G])
            hidden_GRH = hidden_GRH if self.is_linear else F.gelu(hidden_GRH)
            weight_GR = pairs.weight_P[place_GR] * real_GR
            out_GRD = torch.bmm(hidden_GRH, self.w_out[own_G]) * weight_GR[..., None]
            y_ND = y_ND.index_add(0, token_GR.flatten(), out_GRD.flatten(0, 1))
        return y_ND


class KilohiveCodes(nn.Module):
    """Signs that stand for the last tokens: the first code is of `gate_shortest` of them, each next one of one more."""

    signs_VD: Tensor

    def __init__(self, config: KilohiveExpertsConfig) -> None:
        super().__init__()
        self.lengths = range(config.gate_shortest, config.gate_shortest + config.gate_heads)
        self.register_buffer("signs_VD", torch.ones(config.vocab_size, config.hidden_size, dtype=torch.int8))

    @property
    def n_back(self) -> int:
        """How many tokens before a position's own its longest code is of."""
        return self.lengths.stop - 2

    def forward(self, ids_BTJ: Tensor, there_BTJ1: Tensor) -> Tensor:
        """Codes [N, Q, D] of ones and minus ones; where no token is, nothing is bound."""
        code_BTD, codes = None, []
        for back in range(self.n_back + 1):
            sign_BTD = F.embedding(ids_BTJ[:, :, back], self.signs_VD)
            sign_BTD = sign_BTD.where(there_BTJ1[:, :, back], 1).roll(back, dims=2)
            code_BTD = sign_BTD if code_BTD is None else code_BTD * sign_BTD
            codes.append(code_BTD)
        return torch.stack(codes[self.lengths.start - 1 :], 2).flatten(0, 1)


def recent(ids_BS: Tensor, real_BS: Tensor, n_new: int, n_back: int) -> tuple[Tensor, Tensor]:
    """Return each new token's id with those of the real tokens before it, [B, T, J], and its place among the real ones.

    `NOTHING` stands where no token is: before the first one, and for those that are masked.
    """
    packed_BS = ids_BS.gather(1, (~real_BS).long().argsort(dim=1, stable=True))
    place_BT = (real_BS.cumsum(1) - 1)[:, -n_new:]
    place_BTJ = place_BT[:, :, None] - torch.arange(n_back + 1, device=ids_BS.device)
    ids_BTJ = packed_BS.gather(1, place_BTJ.clamp(min=0).flatten(1)).view_as(place_BTJ)
    there_BTJ = (place_BTJ >= 0) & real_BS[:, -n_new:, None]
    return ids_BTJ.masked_fill(~there_BTJ, NOTHING), place_BT.clamp(min=0)


def all_ids(
    input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, n_layers: int
) -> tuple[Tensor, Tensor]:
    """Ids [B, S] of what the cache of `n_layers` holds and the new ones, and which are real; both go into the cache.

    ValueError for a mask of another shape, or a cache that cannot keep ids.
    """
    shape = (len(input_ids), input_ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, must be {shape}, cache included")
    real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    ids_BS, real_BS = input_ids, real_BT.to(input_ids.dtype)
    if cache is not None:
        ids_BS, real_BS = _with_history(cache, n_layers, ids_BS, real_BS)
    return ids_BS, (real_BS if attention_mask is None else attention_mask) != 0


def _with_history(cache: Cache, n_layers: int, ids_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What the cache has read of ids, with the new ones: one more layer of it, so that both are reordered alike."""
    if len(cache.layers) < n_layers or cache.is_compileable:
        raise ValueError("the cache must be a DynamicCache made with this model's config")
    if len(cache.layers) == n_layers:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    ids, real = cache.update(ids_BT[:, None, :, None], real_BT[:, None, :, None], n_layers)
    return ids[:, 0, :, 0], real[:, 0, :, 0]
