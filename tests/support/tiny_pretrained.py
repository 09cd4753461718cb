"""Small pretrained models as people have them: folders with a config, safetensors and a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from common.assets import asset_of, asset_of_file
from common.tokenizer import FileTokenizer
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


def new_model(config: LibraryConfig) -> Any:
    """A model with random weights."""
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def save_pretrained(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Write a model whose weights are random, but large enough that every part of it counts."""
    torch.manual_seed(5)
    with quiet_transformers():
        return _save(folder, KINDS[kind](**{**SHAPE, **changes}))


def _save(folder: Path, config: LibraryConfig) -> Path:
    model = new_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer(N_TOKENS))
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def pretrained_manifest(folder: Path, **changes: Any) -> Manifest:
    """A run with experts beside layers 1 and 3 of the model in `folder`."""
    files = tuple(
        PretrainedFile(name=path.name, sha256=asset_of_file(path).sha256, n_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    )
    tokenizer = asset_of((folder / "tokenizer.json").read_bytes())
    model: dict[str, Any] = {
        "trunk": "hf",
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 1,
        "context": 32,
        "vocab_size": FileTokenizer(tiny_tokenizer(N_TOKENS), "tiny").vocab_size,
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
        data=DataConfig(tokenizer=tokenizer.sha256, tokenizer_bytes=tokenizer.n_bytes),
        pretrained=PretrainedConfig(**{**pretrained, **{k: v for k, v in changes.items() if k not in of_model}}),
    )
