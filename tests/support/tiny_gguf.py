"""A small language model in one GGUF file, its matrices quantised, as people have such models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from common.pretrained_source import find_pretrained, shape_of
from tests.support.tiny_pretrained import CHAT_TEMPLATE, END, N_TOKENS, chat_tokenizer, kept_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.manifest import Manifest

WIDTH, HIDDEN, N_LAYERS, N_HEADS, N_KEY_HEADS = 32, 64, 3, 4, 2
"""Quantised rows are multiples of 32 numbers."""


def save_gguf(path: Path, splits: str = "default") -> Path:
    """Write the file; its weights are random, its tokenizer and its template are those of `save_chat_model`.

    `splits` is what the file says of how its tokenizer splits text.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(N_TOKENS)
    _add_tokens(writer, splits)
    for name, shape in _shapes().items():
        _add_weight(writer, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: GGUFWriter, splits: str) -> None:
    table = json.loads(chat_tokenizer())
    ids: dict[str, int] = {
        **table["model"]["vocab"],
        **{token["content"]: token["id"] for token in table["added_tokens"]},
    }
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token == END else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in table["model"]["merges"]])
    writer.add_eos_token_id(ids[END])
    writer.add_pad_token_id(ids[END])
    writer.add_chat_template(CHAT_TEMPLATE)


def _shapes() -> dict[str, tuple[int, ...]]:
    keys = WIDTH // N_HEADS * N_KEY_HEADS
    of_layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (keys, WIDTH),
        "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    layers = {f"blk.{n}.{name}.weight": shape for n in range(N_LAYERS) for name, shape in of_layer.items()}
    return {"token_embd.weight": (N_TOKENS, WIDTH), **layers, "output_norm.weight": (WIDTH,)}


def _add_weight(writer: GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(len(name) + sum(map(ord, name))).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        writer.add_tensor(name, 1 + drawn / 10)
        return
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor(name, quantize(drawn / 3, kind), raw_dtype=kind)


def gguf_manifest(folder: Path, **changes: Any) -> Manifest:
    """A run around the model of `save_gguf`, which is made in `folder` and kept on this machine."""
    folder.mkdir()
    tokenizer = shape_of(find_pretrained(str(save_gguf(folder / "tiny.gguf")))).tokenizer
    return kept_manifest(folder, tokenizer, **{"d_model": WIDTH, "attach": (1, 2), **changes})
