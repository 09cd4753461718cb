"""A model that a Kilohive swarm has trained, for transformers: its configuration and its inference.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It needs nothing but torch, transformers and the two files beside it, which have the gates and the experts.
"""

# Shapes: B sequences, S positions of what was read and is new, T new positions, N = B * T tokens, D width, V token
#         values, A attention heads, C = D / A channels of a head, J tokens back (0 is the token itself), Q heads of the
#         gate.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .kilohive_experts import NOTHING, KilohiveCodes, KilohiveExpertsConfig, KilohiveMoE, all_ids, recent
from .kilohive_gates import weight

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class KilohiveConfig(KilohiveExpertsConfig):  # type: ignore[no-untyped-call]  # see KilohiveExpertsConfig
    """The model's shape, and how a token's experts are chosen."""

    model_type = "kilohive"

    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    smear: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True


class KilohiveForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # the same
    """Ids in, logits of the next token out.

    What `attention_mask` masks is not there: the logits of a row are those of its other tokens alone, wherever the
    masked ones stand.
    """

    config_class = KilohiveConfig
    base_model_prefix = ""
    _no_split_modules = ["KilohiveLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    # Scores in half precision would choose other experts.
    _keep_in_fp32_modules_strict = ["gate"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__(config)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding_VD = weight(*shape)
        self.smear_JD = weight(config.smear, config.hidden_size) if config.smear else None
        self.codes = KilohiveCodes(config) if config.gate_reads == "tokens" else None
        self.layers = nn.ModuleList(KilohiveLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head_VD = weight(*shape)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def n_back(self) -> int:
        """How many tokens before its own a position looks back to, below attention."""
        n_smeared = 0 if self.smear_JD is None else len(self.smear_JD)
        return max(n_smeared, 0 if self.codes is None else self.codes.n_back)

    def forward(  # noqa: PLR0913, PLR0917 - what transformers calls it with
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] of ids [B, T], and with `labels` the mean loss in nats of foretelling each next one.

        `attention_mask` [B, S] covers what `cache` holds and the new ids. ValueError where that is more than the
        context that the model was trained for.
        """
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        self._check_length(input_ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
        ids_BS, real_BS = all_ids(input_ids, attention_mask, cache, self.config.num_hidden_layers)
        ids_BTJ, place_BT = recent(ids_BS, real_BS, input_ids.shape[1], self.n_back)
        x_BTD, code_NQD = self._embedded(ids_BTJ)
        seen_B1TS, rotation = seen(real_BS, place_BT.shape[1]), self._rotation(place_BT, x_BTD)
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rotation, seen_B1TS, code_NQD, cache, index)
        if labels is None:
            x_BTD = x_BTD[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits_BTV = F.linear(self.final_norm(x_BTD), self.head_VD)
        loss = None if labels is None else next_token_loss(logits_BTV, labels)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache)
        return output if return_dict is not False else output.to_tuple()

    def _check_length(self, n_all: int) -> None:
        if n_all > self.config.max_position_embeddings:
            raise ValueError(
                f"{n_all} tokens are more than the {self.config.max_position_embeddings} of this model's context: "
                "shorten the text, or ask for fewer new tokens"
            )

    def _embedded(self, ids_BTJ: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first layer reads [B, T, D], and the codes [N, Q, D] that gates choose by, None if by x itself."""
        there_BTJ = (ids_BTJ != NOTHING)[..., None]
        known_BTJ = ids_BTJ.clamp(min=0)
        x_BTD = F.embedding(known_BTJ[:, :, 0], self.embedding_VD) * there_BTJ[:, :, 0]
        mixed_BTD = x_BTD
        for back, weight_D in enumerate(() if self.smear_JD is None else self.smear_JD, start=1):
            earlier_BTD = F.embedding(known_BTJ[:, :, back], self.embedding_VD) * there_BTJ[:, :, back]
            mixed_BTD = mixed_BTD + weight_D * earlier_BTD
        return mixed_BTD, None if self.codes is None else self.codes(known_BTJ, there_BTJ)

    def _rotation(self, place_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, C / 2] of rotary positions (arXiv 2104.09864), by float64 angles."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        # On the processor, as not every device has float64.
        frequency = self.config.rope_base ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angle_B1TC = place_BT.cpu()[:, None, :, None] * frequency
        return angle_B1TC.cos().to(like), angle_B1TC.sin().to(like)


class KilohiveLayer(nn.Module):
    """Attention, then experts, each after a norm and added to what came in."""

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = KilohiveAttention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.moe = KilohiveMoE(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        seen_B1TS: Tensor,
        code_NQD: Tensor | None,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        """x_BTD -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, seen_B1TS, cache, index)
        x_ND = self.moe_norm(x_BTD).flatten(0, 1)
        y_ND: Tensor = self.moe(x_ND, code_NQD)
        return x_BTD + y_ND.view_as(x_BTD)


class KilohiveAttention(nn.Module):
    """Multi-head attention over the past; queries and keys are RMS-normalised per head, then turned."""

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.qkv_weight = weight(3 * width, width)
        self.out_weight = weight(width, width)
        self.query_norm = nn.RMSNorm(width // self.n_heads, eps=config.norm_eps)
        self.key_norm = nn.RMSNorm(width // self.n_heads, eps=config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], seen_B1TS: Tensor, cache: Cache | None, index: int
    ) -> Tensor:
        """x_BTD -> [B, T, D]; the cache has keys after their rotation."""
        heads = F.linear(x_BTD, self.qkv_weight).view(*x_BTD.shape[:2], 3, self.n_heads, -1)
        query_BATC, key_BASC, value_BASC = heads.permute(2, 0, 3, 1, 4)
        query_BATC = rotate(self.query_norm(query_BATC), rotation)
        key_BASC = rotate(self.key_norm(key_BASC), rotation)
        if cache is not None:
            key_BASC, value_BASC = cache.update(key_BASC, value_BASC, index)
        mixed_BATC = F.scaled_dot_product_attention(query_BATC, key_BASC, value_BASC, attn_mask=seen_B1TS)
        return F.linear(mixed_BATC.transpose(1, 2).flatten(2), self.out_weight)


def rotate(x_BATC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (channel c, channel c + C/2) by its position's angle."""
    cos_B1TC, sin_B1TC = rotation
    first, second = x_BATC.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TC - second * sin_B1TC, first * sin_B1TC + second * cos_B1TC), dim=-1)


def seen(real_BS: Tensor, n_new: int) -> Tensor:
    """What each new position attends to, [B, 1, T, S]: real ones up to itself; and itself, so that no row is empty."""
    position_S = torch.arange(real_BS.shape[1], device=real_BS.device)
    own_T1 = position_S[-n_new:, None]
    return ((position_S <= own_T1) & (real_BS[:, None, :] | (position_S == own_T1)))[:, None]


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean loss in nats, over the labels that are not -100."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())
