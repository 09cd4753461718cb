"""From the folder of an exported model to a model in this process. Nothing of it is believed before it is checked.

Hashes first, then the configuration, then names, shapes and types of all tensors; only then memory is taken for them.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import CheckpointError, DataError
from common.tokenizer import ByteTokenizer, FileTokenizer
from common.vocabulary import MAX_TOKENIZER_BYTES
from node.model.experts.adam import zero_state
from node.model.experts.block import Block
from node.model.experts.kinds import expert_kind
from node.model.moe import LocalExperts
from node.trainer.exported.config_file import read_config
from node.trainer.exported.layout import CONFIG, INDEX, TOKENIZER, expert_tensor, parts_of, trunk_tensors
from node.trainer.exported.sums import check_sums, read_bounded, read_sums
from node.trainer.train_step import build_transformer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.tokenizer import Tokenizer
    from node.model.transformer import Transformer
    from node.trainer.exported.config_file import ExportedConfig
    from protocol.manifest import BlockId, Manifest

MAX_INDEX_BYTES = 256 << 20
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int8: "I8", torch.int64: "I64"}


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model that has left its swarm, in evaluation mode, whose experts are in this process."""

    model: Transformer
    experts: LocalExperts
    tokenizer: Tokenizer
    config: ExportedConfig


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Transformer:
    """The model of a folder that `export` wrote: ids [B, T] in, logits [B, T, V] out, in evaluation mode.

    The folder's own code is not run. Raises CheckpointError, which names the file, for a folder that is not whole.
    """
    return open_export(Path(folder), torch.device(device)).model


def open_export(folder: Path, device: torch.device) -> ExportedModel:
    """The model with its tokenizer. Raises CheckpointError, DataError for a tokenizer that cannot be read."""
    sums = read_sums(folder)
    check_sums(folder, sums, (CONFIG, INDEX, TOKENIZER))
    config = read_config(folder)
    with ExitStack() as stack:
        weights = _Weights(folder, _files(folder, sums), stack)
        weights.check(config.manifest)
        experts = LocalExperts(config.manifest, device, weights.block)
        model = build_transformer(config.manifest, experts, torch.Generator())
        weights.fill(model)
    return ExportedModel(
        model=model.to(device).eval(), experts=experts, tokenizer=_tokenizer(folder, config), config=config
    )


class _Weights:
    """The tensors of a folder, read when they are asked for."""

    def __init__(self, folder: Path, names: Iterable[str], stack: ExitStack) -> None:
        self._folder = folder
        self._files: dict[str, tuple[str, Any]] = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / name}: is no safetensors file: {str(error)[:100]}") from None
            self._files |= dict.fromkeys(file.keys(), (name, file))

    def check(self, manifest: Manifest) -> None:
        """Raise CheckpointError unless the tensors are those of the model, of its shapes and types."""
        wanted = {tensor.name: tensor for part in parts_of(manifest) for tensor in part.tensors}
        if odd := sorted(wanted.keys() ^ self._files.keys()):
            problem = "is missing" if odd[0] in wanted else "belongs to no model of this configuration"
            raise CheckpointError(f"{self._folder}: tensor {odd[0]} {problem}; take the folder again, whole")
        for name, (file_name, file) in self._files.items():
            found, tensor = file.get_slice(name), wanted[name]
            if (tuple(found.get_shape()), found.get_dtype()) != (tensor.shape, SAFETENSORS_DTYPES[tensor.dtype]):
                raise CheckpointError(
                    f"{self._folder / file_name}: tensor {name} is {found.get_dtype()} {found.get_shape()}, must be "
                    f"{SAFETENSORS_DTYPES[tensor.dtype]} {list(tensor.shape)}"
                )

    def block(self, manifest: Manifest, block_id: BlockId, device: torch.device) -> Block:
        """A block with its weights, that has taken no step."""
        kind = expert_kind(manifest.model.expert_kind)
        params = {name: self._tensor(expert_tensor(block_id, name)).to(device) for name in kind.shapes(manifest.model)}
        experts = manifest.model.block_experts(block_id.block)
        learnt_E = torch.zeros(len(experts), dtype=torch.float64)
        return Block(id=block_id, experts=experts, kind=kind, params=params, adam=zero_state(params), learnt_E=learnt_E)

    @torch.no_grad()
    def fill(self, model: Transformer) -> None:
        """Put the trunk's tensors into `model`, what was drawn from the run's seed too."""
        places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name in trunk_tensors(model):
            places[name].copy_(self._tensor(name))

    def _tensor(self, name: str) -> torch.Tensor:
        file_name, file = self._files[name]
        tensor: torch.Tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._folder / file_name}: tensor {name} holds a number that is not finite")
        return tensor


def _files(folder: Path, sums: Iterable[str]) -> list[str]:
    """The names of the files with weights, as the index has them."""
    path = folder / INDEX
    try:
        names = set(json.loads(read_bounded(path, MAX_INDEX_BYTES))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: is not the index of files that `export` wrote") from None
    if unknown := names - set(sums):
        raise CheckpointError(f"{path}: names {str(next(iter(unknown)))[:100]!r}, which SHA256SUMS does not")
    return sorted(names)


def _tokenizer(folder: Path, config: ExportedConfig) -> Tokenizer:
    if config.manifest.data.tokenizer_asset is None:
        return ByteTokenizer()
    data = read_bounded(folder / TOKENIZER, MAX_TOKENIZER_BYTES)
    tokenizer = FileTokenizer(data, str(folder / TOKENIZER))
    if tokenizer.vocab_size > config.manifest.model.vocab_size:
        raise DataError(f"{folder / TOKENIZER}: has {tokenizer.vocab_size:,} tokens, more than the model")
    return tokenizer
