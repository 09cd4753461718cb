"""A seed model of a few thousand random weights that reads bytes, and texts of four domains for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.adapters.domains import Domain, parted
from experiments.adapters.seed.model import Seed, SeedModel
from experiments.adapters.seed.package import SeedFile
from experiments.adapters.seed.tokenizer import SeedTokenizer

if TYPE_CHECKING:
    from experiments.adapters.domains import DomainName

LAYERS, D_MODEL, HEADS, HIDDEN = 3, 16, 2, 24
BYTES = 256
WORDS: dict[DomainName, str] = {
    "mathematics": "|- ( ph -> ps ) $= ",
    "german": "und der Dachs ",
    "french": "est une abeille ",
    "english": "of the river ",
}


class TinyFile(SeedFile):
    """What a GGUF file would say, in float32."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._values = {
            "llama.block_count": LAYERS,
            "llama.embedding_length": D_MODEL,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": 1,
            "llama.rope.freq_base": 1e4,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
        }

    def field(self, name: str) -> Any:
        return self._values[name]

    def tensor(self, name: str) -> Any:
        shapes = {
            "token_embd": (BYTES, D_MODEL),
            "attn_k": (D_MODEL // HEADS, D_MODEL),
            "attn_v": (D_MODEL // HEADS, D_MODEL),
            "ffn_gate": (HIDDEN, D_MODEL),
            "ffn_up": (HIDDEN, D_MODEL),
            "ffn_down": (D_MODEL, HIDDEN),
        }
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part.endswith("norm"):
            return SimpleNamespace(data=np.ones(D_MODEL, np.float32))
        shape = shapes.get(part, (D_MODEL, D_MODEL))
        data = self._rng.normal(0.0, shape[1] ** -0.5, shape).astype(np.float32)
        return SimpleNamespace(data=data, shape=shape[::-1], tensor_type=0)


class ByteTokenizer(SeedTokenizer):
    """A token for each byte."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def tiny_seed() -> Seed:
    return Seed(SeedModel(TinyFile()).eval(), ByteTokenizer())


def tiny_domain(name: DomainName) -> Domain:
    """A hundred documents of a line each, all alike but for a number."""
    training, held_out = parted([f"{n} {WORDS[name] * 3}" for n in range(200)])
    return Domain(name=name, training=training, held_out=held_out)
