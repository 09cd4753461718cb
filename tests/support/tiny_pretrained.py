"""Small pretrained models as people have them: folders with a config, safetensors and a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from common.assets import asset_of, asset_of_file, asset_store
from node.model.pretrained_files import quiet_transformers
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from protocol.run_assets import DataConfig, PretrainedConfig, PretrainedFile
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig as LibraryConfig

N_TOKENS = 300
SHAPE: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, type[LibraryConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
REACH = 4
SLIDING: dict[str, tuple[type[LibraryConfig], dict[str, Any]]] = {
    "all slide": (MistralConfig, {"sliding_window": REACH}),
    "some slide": (
        Gemma3TextConfig,
        {
            "sliding_window": REACH,
            "head_dim": 4,
            "query_pre_attn_scalar": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "some slide, beside others that do not": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": REACH, "max_window_layers": 2},
    ),
}
"""Models whose layers see the last REACH tokens, or some of whose layers do."""
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def new_model(config: LibraryConfig) -> Any:
    """A model with random weights."""
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def save_pretrained(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a model whose weights are random, but large enough that every part of it counts."""
    torch.manual_seed(5)
    config, more = SLIDING[kind] if kind in SLIDING else (KINDS[kind], {})
    with quiet_transformers():
        return _save(folder, new_model(config(**{**SHAPE, **more, **changes})), dtype)


def save_chat_model(folder: Path, **changes: Any) -> Path:
    """The same with a token that ends a turn, and a template for chats."""
    save_pretrained(folder, bos_token_id=None, eos_token_id=N_TOKENS - 1, **changes)
    (folder / "tokenizer.json").write_bytes(chat_tokenizer())
    library: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )
    library.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(chat_tokenizer())
    return folder


def chat_tokenizer() -> bytes:
    """The last of the N_TOKENS tokens ends a turn."""
    library = Tokenizer.from_buffer(tiny_tokenizer(N_TOKENS - 1))
    library.add_special_tokens([END])
    return library.to_str().encode("utf-8")


def kept_manifest(folder: Path, tokenizer: bytes | None = None, **changes: Any) -> Manifest:
    """A run around the model in `folder`, whose files are kept on this machine."""
    manifest = pretrained_manifest(folder, tokenizer, **changes)
    if tokenizer is not None:
        asset_store().add(tokenizer)
    for file in manifest.pretrained.files:
        asset_store().add_file(folder / file.name)
    return manifest


def _save(folder: Path, model: Any, dtype: torch.dtype) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer(N_TOKENS))
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def pretrained_manifest(folder: Path, tokenizer: bytes | None = None, **changes: Any) -> Manifest:
    """A run with experts beside layers 1 and 3 of the model in `folder`, where the tokenizer is if it is not given."""
    files = tuple(
        PretrainedFile(name=path.name, sha256=asset_of_file(path).sha256, n_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    )
    asset = asset_of((folder / "tokenizer.json").read_bytes() if tokenizer is None else tokenizer)
    model: dict[str, Any] = {
        "trunk": "hf",
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 1,
        "context": 32,
        "vocab_size": N_TOKENS,
        "expert_kind": "lora",
        "expert_hidden": 2,
        "experts_per_layer": 16,
        "experts_per_block": 4,
        "experts_per_token": 2,
        "capacity_factor": 0.0,
    }
    pretrained: dict[str, Any] = {"files": files, "attach": (1, 3)}
    of_model = {name: value for name, value in changes.items() if name not in {"dtype", "unfreeze", "attach"}}
    return Manifest(
        name="pretrained",
        codec="fp32",
        model=ModelConfig(**{**model, **of_model}),
        optimizer=OptimizerConfig(warmup_tokens=0, lr=0.02, expert_lr=0.02),
        data=DataConfig(tokenizer=asset.sha256, tokenizer_bytes=asset.n_bytes),
        pretrained=PretrainedConfig(**{**pretrained, **{k: v for k, v in changes.items() if k not in of_model}}),
    )
