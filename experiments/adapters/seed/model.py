"""The seed model in plain torch: a Llama whose weights never move, with room for adapters around its FFNs.

Shapes: B sequences, T positions, D model width, V tokens of the vocabulary, A heads, C channels of a head,
N = B * T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.adapters.seed.matrix import FrozenMatrix, vector
from experiments.adapters.seed.package import SeedFile, seed_file
from experiments.adapters.seed.tokenizer import SeedTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class SeedShape:
    """The shape of the model, as its file says."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    rope_base: float
    norm_eps: float

    @property
    def channels(self) -> int:
        """The channels of one head."""
        return self.d_model // self.n_heads

    @classmethod
    def of(cls, file: SeedFile) -> SeedShape:
        """Read from `file`."""
        return cls(
            n_layers=file.field("llama.block_count"),
            d_model=file.field("llama.embedding_length"),
            n_heads=file.field("llama.attention.head_count"),
            n_kv_heads=file.field("llama.attention.head_count_kv"),
            rope_base=file.field("llama.rope.freq_base"),
            norm_eps=file.field("llama.attention.layer_norm_rms_epsilon"),
        )


class SeedLayer(nn.Module):
    """Attention, then the FFN, each on the normalised sum of all before it."""

    def __init__(self, file: SeedFile, shape: SeedShape, layer: int, *, packed: bool) -> None:
        super().__init__()
        self.shape = shape
        self.attn_norm: Tensor
        self.ffn_norm: Tensor
        for part in ("attn_norm", "ffn_norm"):
            self.register_buffer(part, vector(file, f"blk.{layer}.{part}.weight"), persistent=False)

        def matrix(part: str) -> FrozenMatrix:
            return FrozenMatrix(file, f"blk.{layer}.{part}.weight", packed=packed)

        self.attn_q, self.attn_k, self.attn_v = matrix("attn_q"), matrix("attn_k"), matrix("attn_v")
        self.attn_output = matrix("attn_output")
        self.ffn_gate, self.ffn_up, self.ffn_down = matrix("ffn_gate"), matrix("ffn_up"), matrix("ffn_down")

    def forward(self, x_BTD: Tensor, rotation: Tensor, adapter: nn.Module | None) -> Tensor:
        """x_BTD -> [B, T, D]; `adapter` (N, D -> N, D) sees what the FFN sees, and is added to what it gives."""
        x_BTD = x_BTD + self._attention(self._normalised(x_BTD, self.attn_norm), rotation)
        h_BTD = self._normalised(x_BTD, self.ffn_norm)
        x_BTD = x_BTD + self.ffn_down(functional.silu(self.ffn_gate(h_BTD)) * self.ffn_up(h_BTD))
        return x_BTD if adapter is None else x_BTD + adapter(h_BTD.flatten(0, 1)).view_as(x_BTD)

    def _normalised(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        return functional.rms_norm(x_BTD, gain_D.shape, gain_D, self.shape.norm_eps)

    def _attention(self, h_BTD: Tensor, rotation: Tensor) -> Tensor:
        projections = (self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (part(h_BTD).unflatten(-1, (-1, self.shape.channels)).transpose(1, 2) for part in projections)
        shared = self.shape.n_heads // self.shape.n_kv_heads
        k, v = (heads.repeat_interleave(shared, dim=1) for heads in (k, v))
        mixed_BATC = functional.scaled_dot_product_attention(
            _rotate(q, rotation), _rotate(k, rotation), v, is_causal=True
        )
        out_BTD: Tensor = self.attn_output(mixed_BATC.transpose(1, 2).flatten(2))
        return out_BTD


class SeedModel(nn.Module):
    """Token numbers in, logits out. No cache of keys and values: whole texts are scored, not written."""

    def __init__(self, file: SeedFile, *, packed: bool = False) -> None:
        super().__init__()
        self.shape = SeedShape.of(file)
        self.tokens = FrozenMatrix(file, "token_embd.weight", packed=packed)
        self.layers = nn.ModuleList(
            SeedLayer(file, self.shape, layer, packed=packed) for layer in range(self.shape.n_layers)
        )
        self.norm: Tensor
        self.register_buffer("norm", vector(file, "output_norm.weight"), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """ids_BT -> logits [B, T, V]."""
        return self.logits(self.run(self.embed(ids_BT), 0))

    def embed(self, ids_BT: Tensor) -> Tensor:
        """What enters the first layer."""
        return self.tokens.rows(ids_BT)

    def run(
        self, x_BTD: Tensor, start: int, stop: int | None = None, adapters: Mapping[int, nn.Module] | None = None
    ) -> Tensor:
        """Layers `start` to `stop`, with `adapters` around the FFNs of those that have one."""
        rotation = rope_angles(x_BTD.shape[1], self.shape, x_BTD.device)
        stop = self.shape.n_layers if stop is None else stop
        for index in range(start, stop):
            x_BTD = self.layers[index](x_BTD, rotation, (adapters or {}).get(index))
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        """What leaves the last layer -> logits, by the table of tokens once more."""
        logits_BTV: Tensor = self.tokens(self.normalised(x_BTD))
        return logits_BTV

    def normalised(self, x_BTD: Tensor) -> Tensor:
        """What leaves the last layer, as the table of tokens takes it."""
        return functional.rms_norm(x_BTD, self.norm.shape, self.norm, self.shape.norm_eps)

    def nats(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each target [B, T], in nats."""
        logits_NV = self.logits(x_BTD).flatten(0, 1)
        return functional.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none").view_as(targets_BT)


@dataclass(frozen=True)
class Seed:
    """The model and its tokenizer."""

    model: SeedModel
    tokenizer: SeedTokenizer

    @torch.no_grad()
    def continuation(self, prompt: str, n_tokens: int) -> str:
        """The likeliest next token, and so on."""
        ids = self.tokenizer.encode(prompt)
        for _ in range(n_tokens):
            x_BTD = self.model.run(self.model.embed(torch.tensor([ids])), 0)
            ids.append(int(self.model.logits(x_BTD[:, -1:]).argmax()))
        return self.tokenizer.decode(ids[len(ids) - n_tokens :])

    @torch.no_grad()
    def nats_per_token(self, text: str) -> float:
        """Mean over all tokens of `text` but the first, which nothing precedes."""
        ids = torch.tensor([self.tokenizer.encode(text)])
        return float(self.model.nats(self.model.run(self.model.embed(ids[:, :-1]), 0), ids[:, 1:]).mean())


def load_seed(*, packed: bool = False) -> Seed:
    """Load the seed from the package that `make setup-seed` installs; raises DataError where it is missing.

    `packed` keeps weights as they are in the file: a fifth of the memory for a slower pass.
    """
    file = SeedFile(seed_file())
    return Seed(SeedModel(file, packed=packed).eval(), SeedTokenizer(file))


def rope_angles(n_positions: int, shape: SeedShape, device: torch.device) -> Tensor:
    """Angles of rotary positions as complex numbers of length one, [T, C / 2]."""
    half = torch.arange(0, shape.channels, 2, dtype=torch.float64)
    angle_TC = torch.arange(n_positions, dtype=torch.float64)[:, None] * shape.rope_base ** (-half / shape.channels)
    return torch.polar(torch.ones_like(angle_TC), angle_TC).to(device=device, dtype=torch.complex64)


def _rotate(x_BATC: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of channels (2c, 2c + 1): the order that GGUF stores Llama's projections in."""
    pairs = torch.view_as_complex(x_BATC.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)
