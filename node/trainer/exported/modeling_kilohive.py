"""A model that a Kilohive swarm has trained, for transformers: its configuration and its inference, in one file.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It needs nothing but torch and transformers, and draws nothing at random: all that it computes with is in the folder. A
token's experts are chosen and weighed as in the swarm when all of its experts are live. It is for inference: gradients
flow, but nothing here balances the load of the experts or drops what is over an expert's capacity.
"""

# Shapes: B sequences, S positions of what was read and is new, T new positions, N = B * T tokens, D width, V token
#         values, A attention heads, C = D / A channels of a head, J tokens back (0 is the token itself), Q heads of the
#         gate, E experts of a layer, K experts of a token, M of them chosen by heads before, N1 those that a head
#         chooses, n sub-keys of a table (in names: U), R candidates or rows, G experts of a product, P = N * K pairs.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTHING = -1
"""Stands in place of a token's id where no token is."""

GATE_TOKENS = 1024
"""The gate scores so many tokens at once, which bounds its memory."""

CODE_BITS = 62
MIX = (-4658895280553007687, -7723592293110705685)
CANDIDATES_PER_CHOICE = 2


class KilohiveConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its base is not annotated throughout
    """The model's shape, and how a token's experts are chosen."""

    model_type = "kilohive"

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    smear: int = 0
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
    tie_word_embeddings: bool = False
    use_cache: bool = True
    kilohive: dict[str, Any] | None = None


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
        self.embedding_VD = _weight(*shape)
        self.smear_JD = _weight(config.smear, config.hidden_size) if config.smear else None
        self.codes = KilohiveCodes(config) if config.gate_reads == "tokens" else None
        self.layers = nn.ModuleList(KilohiveLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head_VD = _weight(*shape)
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
        ids_BS, real_BS = self._all_ids(input_ids, attention_mask, cache)
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

    def _all_ids(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Ids [B, S] of what the cache holds and the new ones, and which of them are real; both go into the cache."""
        n_all = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        if n_all > self.config.max_position_embeddings:
            raise ValueError(
                f"{n_all} tokens are more than the {self.config.max_position_embeddings} of this model's context: "
                "shorten the text, or ask for fewer new tokens"
            )
        shape = (len(input_ids), n_all)
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, must be {shape}, cache included")
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        ids_BS, real_BS = input_ids, real_BT.to(input_ids.dtype)
        if cache is not None:
            ids_BS, real_BS = _with_history(cache, self.config.num_hidden_layers, ids_BS, real_BS)
        return ids_BS, (real_BS if attention_mask is None else attention_mask) != 0

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
        self.qkv_weight = _weight(3 * width, width)
        self.out_weight = _weight(width, width)
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


class KilohiveMoE(nn.Module):
    """The weighted sum of each token's experts. All are here, so none's share goes to the others."""

    def __init__(self, config: KilohiveConfig) -> None:
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

    def __init__(self, config: KilohiveConfig, experts: range) -> None:
        super().__init__()
        self.of, self.is_linear = experts, config.expert_kind == "lora"
        self.w_in = _weight(len(experts), config.hidden_size, config.expert_hidden)
        self.w_out = _weight(len(experts), config.expert_hidden, config.hidden_size)

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

    def __init__(self, config: KilohiveConfig) -> None:
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


class KilohiveGate(nn.Module, ABC):
    """Each head chooses as many experts, none that one before it has; one softmax weighs them all.

    Experts are chosen by score + bias and weighed by the score: the logit, or its sigmoid.
    """

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__()
        self.n_experts, self.n_heads = config.num_experts, config.gate_heads
        self.is_sigmoid = config.gate_score == "sigmoid"
        self.per_head = config.num_experts_per_tok // config.gate_heads

    def forward(self, x_NQD: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, K] and weights [N, K], whose rows sum to 1, by what each head reads."""
        dtype = next((t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), torch.float32)
        ids_NK = torch.empty(len(x_NQD), 0, dtype=torch.int64, device=x_NQD.device)
        logits = []
        for head in range(self.n_heads):
            ids, logits_of_head = self.choose(head, x_NQD[:, head].to(dtype), ids_NK)
            ids_NK = torch.cat((ids_NK, ids), 1)
            logits.append(logits_of_head)
        logits_NK = torch.cat(logits, 1)
        return ids_NK, torch.softmax(F.logsigmoid(logits_NK) if self.is_sigmoid else logits_NK, dim=-1)

    @abstractmethod
    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and logits of a head's experts, none of them among `taken_NM`."""

    def scores(self, logits: Tensor) -> Tensor:
        """What biases are added to."""
        return logits.sigmoid() if self.is_sigmoid else logits


class KilohiveTopKGate(KilohiveGate):
    """One linear map scores every expert."""

    bias_E: Tensor

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__(config)
        self.expert_keys_ED = _weight(config.num_experts, config.hidden_size)
        self.register_buffer("bias_E", torch.zeros(config.num_experts))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - all alike
        """Choose the best of all."""
        selection_NE = self.scores(F.linear(x_ND, self.expert_keys_ED)) + self.bias_E
        ids = selection_NE.scatter(1, taken_NM, -torch.inf).topk(self.per_head).indices
        return ids, (F.embedding(ids, self.expert_keys_ED) * x_ND[:, None]).sum(-1)


class KilohiveProductKeyGate(KilohiveGate):
    """Expert i * n + j has the score of row i plus that of column j (arXiv 1907.05242)."""

    bias_E: Tensor

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__(config)
        width, self.n = config.hidden_size, round(config.num_experts**0.5)
        is_mapped = config.gate_reads == "hidden"
        self.query_weight = _weight(config.gate_heads * width, width) if is_mapped else None
        self.sub_keys_2SC = _weight(2, self.n, width // 2)
        self.register_buffer("bias_E", torch.zeros(config.num_experts))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the best where the best rows cross the best columns."""
        if self.query_weight is not None:
            x_ND = F.linear(x_ND, self.query_weight.view(self.n_heads, *x_ND.shape[1:], -1)[head])
        halves = [F.rms_norm(half_NC, half_NC.shape[-1:]) for half_NC in x_ND.chunk(2, dim=-1)]
        first_NU, second_NU = (F.linear(half_NC, self.sub_keys_2SC[side]) for side, half_NC in enumerate(halves))
        rows_NR, columns_NR = self._shortlist(first_NU, second_NU, taken_NM.shape[1])
        logits_NRR = first_NU.gather(1, rows_NR)[:, :, None] + second_NU.gather(1, columns_NR)[:, None, :]
        candidates = (rows_NR[:, :, None] * self.n + columns_NR[:, None, :]).flatten(1)
        selection = self.scores(logits_NRR.flatten(1)) + self.bias_E[candidates]
        for taken_N in taken_NM.unbind(1):
            selection = selection.masked_fill(candidates == taken_N[:, None], -torch.inf)
        ids = candidates.gather(1, selection.topk(self.per_head).indices)
        return ids, first_NU.gather(1, ids // self.n) + second_NU.gather(1, ids % self.n)

    def _shortlist(self, first_NU: Tensor, second_NU: Tensor, n_taken: int) -> tuple[Tensor, Tensor]:
        """The best rows and columns; those of biases that are in units of the logits count on average."""
        if not self.is_sigmoid:
            bias_UU = self.bias_E.view(self.n, self.n)
            first_NU, second_NU = first_NU + bias_UU.mean(1), second_NU + bias_UU.mean(0)
        n_best = min(CANDIDATES_PER_CHOICE * self.per_head + n_taken, self.n)
        return first_NU.topk(n_best).indices, second_NU.topk(n_best).indices


class KilohiveHashGate(KilohiveGate):
    """A walk over the experts from a start and by a stride that a hash of the code decides; all weigh alike."""

    strides_X: Tensor
    salt_Q: Tensor

    def __init__(self, config: KilohiveConfig) -> None:
        super().__init__(config)
        self.register_buffer("strides_X", torch.ones(config.gate_strides, dtype=torch.int64))
        self.register_buffer("salt_Q", torch.ones(config.gate_heads, dtype=torch.int64))

    def choose(self, head: int, x_ND: Tensor, taken_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the first of the walk that are not taken."""
        bits = x_ND[:, :CODE_BITS] > 0
        code_N = (bits * (1 << torch.arange(bits.shape[1], device=x_ND.device))).sum(1)
        hash_N = mixed(code_N * self.salt_Q[head])
        stride_N = self.strides_X[mixed(hash_N).remainder(len(self.strides_X))]
        n_steps = min(self.n_experts, self.per_head + taken_NM.shape[1])
        step_R = torch.arange(n_steps, device=x_ND.device)
        walk_NR = (hash_N.remainder(self.n_experts)[:, None] + step_R * stride_N[:, None]) % self.n_experts
        free_NR = (walk_NR[:, :, None] != taken_NM[:, None, :]).all(2)
        wish_NR = free_NR * (n_steps - step_R)
        ids = walk_NR.gather(1, wish_NR.topk(self.per_head).indices)
        return ids, x_ND.new_zeros(ids.shape)


GATES: dict[str, type[KilohiveGate]] = {
    "topk": KilohiveTopKGate,
    "product_key": KilohiveProductKeyGate,
    "hash": KilohiveHashGate,
}


def mixed(value_N: Tensor) -> Tensor:
    """A hash of int64 numbers whose every bit depends on all of theirs: splitmix64 (OOPSLA 2014)."""
    for multiplier in MIX:
        value_N = (value_N ^ (value_N >> 31)) * multiplier
    return value_N ^ (value_N >> 32)


def rotate(x_BATC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (channel c, channel c + C/2) by its position's angle."""
    cos_B1TC, sin_B1TC = rotation
    first, second = x_BATC.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TC - second * sin_B1TC, first * sin_B1TC + second * cos_B1TC), dim=-1)


def recent(ids_BS: Tensor, real_BS: Tensor, n_new: int, n_back: int) -> tuple[Tensor, Tensor]:
    """Each new token's id and those of the real tokens before it, [B, T, J], and its place among the real ones.

    `NOTHING` stands where no token is: before the first one, and for those that are masked.
    """
    packed_BS = ids_BS.gather(1, (~real_BS).long().argsort(dim=1, stable=True))
    place_BT = (real_BS.cumsum(1) - 1)[:, -n_new:]
    place_BTJ = place_BT[:, :, None] - torch.arange(n_back + 1, device=ids_BS.device)
    ids_BTJ = packed_BS.gather(1, place_BTJ.clamp(min=0).flatten(1)).view_as(place_BTJ)
    there_BTJ = (place_BTJ >= 0) & real_BS[:, -n_new:, None]
    return ids_BTJ.masked_fill(~there_BTJ, NOTHING), place_BT.clamp(min=0)


def seen(real_BS: Tensor, n_new: int) -> Tensor:
    """What each new position attends to, [B, 1, T, S]: real ones up to itself; and itself, so that no row is empty."""
    position_S = torch.arange(real_BS.shape[1], device=real_BS.device)
    own_T1 = position_S[-n_new:, None]
    return ((position_S <= own_T1) & (real_BS[:, None, :] | (position_S == own_T1)))[:, None]


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean loss in nats, over the labels that are not -100."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())


def _with_history(cache: Cache, n_layers: int, ids_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What the cache has read of ids, with the new ones: one more layer of it, so that both are reordered alike."""
    if len(cache.layers) < n_layers or cache.is_compileable:
        raise ValueError("the cache must be a DynamicCache made with this model's config")
    if len(cache.layers) == n_layers:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    ids, real = cache.update(ids_BT[:, None, :, None], real_BT[:, None, :, None], n_layers)
    return ids[:, 0, :, 0], real[:, 0, :, 0]


def _weight(*shape: int) -> nn.Parameter:
    """A weight that a folder's shards fill: nothing is drawn here."""
    return nn.Parameter(torch.zeros(shape))
