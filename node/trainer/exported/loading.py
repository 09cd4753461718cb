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
from node.trainer.exported.layout import CONFIG, INDEX, PRETRAINED, TOKENIZER, expert_tensor, parts_of, trunk_places
from node.trainer.exported.sums import check_sums, read_bounded, read_sums
from node.trainer.train_step import build_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

    from common.tokenizer import Tokenizer
    from node.model.trunk import Trunk
    from node.trainer.exported.config_file import ExportedConfig
    from node.trainer.exported.layout import ModelPart
    from protocol.manifest import BlockId, Manifest

MAX_INDEX_BYTES = 256 << 20
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model that has left its swarm, in evaluation mode, whose experts are in this process."""

    model: Trunk
    experts: LocalExperts
    tokenizer: Tokenizer
    config: ExportedConfig


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Trunk:
    """The model of a folder that `export` wrote: ids [B, T] in, logits [B, T, V] out, in evaluation mode.

    The folder's own code is not run. Raises CheckpointError, which names the file, for a folder that is not whole.
    """
    return open_export(Path(folder), torch.device(device)).model


def open_export(folder: Path, device: torch.device) -> ExportedModel:
    """The model with its tokenizer. Raises CheckpointError, DataError for a tokenizer that cannot be read."""
    sums = read_sums(folder)
    check_sums(folder, sums, (CONFIG, INDEX, TOKENIZER))
    config = read_config(folder)
    outline, parts = _outlined(folder, config)
    with ExitStack() as stack:
        weights = _Weights(folder, _files(folder, sums), stack)
        weights.check(parts)
        experts = LocalExperts(config.manifest, device, weights.block)
        pretrained = None if outline is None else weights.pretrained(outline, config.manifest)
        model = build_model(config.manifest, experts, torch.Generator(), pretrained)
        weights.fill(model)
    return ExportedModel(
        model=model.to(device).eval(), experts=experts, tokenizer=_tokenizer(folder, config), config=config
    )


def _outlined(folder: Path, config: ExportedConfig) -> tuple[PreTrainedModel | None, tuple[ModelPart, ...]]:
    """The outline of the pretrained model, if there is one, and all parts of the whole. Takes no memory for weights.

    CheckpointError where transformers makes no model of it, or it and the run do not fit each other.
    """
    try:
        pretrained = None if config.pretrained is None else _outline(config, config.pretrained)
        return pretrained, parts_of(config.manifest, pretrained)
    except DataError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _outline(config: ExportedConfig, table: Mapping[str, Any]) -> PreTrainedModel:
    # These bring the library `transformers`, which takes a second, and few folders need it.
    from node.model.pretrained_files import DTYPES, naming_load_errors, quiet_transformers  # noqa: PLC0415
    from node.model.pretrained_outline import library_config, outline  # noqa: PLC0415

    with quiet_transformers(), naming_load_errors("the pretrained model"):
        return outline(library_config(table), DTYPES[config.manifest.pretrained.dtype])


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

    def check(self, parts: Iterable[ModelPart]) -> None:
        """Raise CheckpointError unless the tensors are those of the model, of its shapes and types."""
        wanted = {tensor.name: tensor for part in parts for tensor in part.tensors}
        if odd := sorted(wanted.keys() ^ self._files.keys()):
            problem = "is missing" if odd[0] in wanted else "belongs to no model of this configuration"
            raise CheckpointError(f"{self._folder}: tensor {odd[0]} {problem}; take the folder again, whole")
        for name, (file_name, file) in self._files.items():
            found, tensor = file.get_slice(name), wanted[name]
            dtype = SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype))
            # Some pretrained models have parts that transformers keeps in float32, whatever the rest is in.
            dtypes = (dtype, "F32") if name.startswith(PRETRAINED) and tensor.dtype.is_floating_point else (dtype,)
            if tuple(found.get_shape()) != tensor.shape or found.get_dtype() not in dtypes:
                raise CheckpointError(
                    f"{self._folder / file_name}: tensor {name} is {found.get_dtype()} {found.get_shape()}, must be "
                    f"{dtype} {list(tensor.shape)}"
                )

    def block(self, manifest: Manifest, block_id: BlockId, device: torch.device) -> Block:
        """A block with its weights, that has taken no step."""
        kind = expert_kind(manifest.model.expert_kind)
        names = {name: expert_tensor(manifest.model, block_id, name) for name in kind.shapes(manifest.model)}
        params = {name: self._tensor(told).to(device) for name, told in names.items()}
        experts = manifest.model.block_experts(block_id.block)
        learnt_E = torch.zeros(len(experts), dtype=torch.float64)
        return Block(id=block_id, experts=experts, kind=kind, params=params, adam=zero_state(params), learnt_E=learnt_E)

    def pretrained(self, outline: PreTrainedModel, manifest: Manifest) -> PreTrainedModel:
        """The pretrained model that has this outline; what the run trains of it is as the run has it."""
        from node.model.pretrained_files import DTYPES  # noqa: PLC0415 - see `_outline`
        from node.model.pretrained_outline import filled  # noqa: PLC0415

        names = {name.removeprefix(PRETRAINED): name for name in self._files if name.startswith(PRETRAINED)}
        tensors = {own: self._tensor(name) for own, name in names.items()}
        return filled(outline, tensors, DTYPES[manifest.pretrained.dtype])

    @torch.no_grad()
    def fill(self, model: Trunk) -> None:
        """Put the trunk's tensors into `model`, what was drawn from the run's seed too."""
        for name, place in trunk_places(model).items():
            place.copy_(self._tensor(name))

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
