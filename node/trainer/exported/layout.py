"""What is in the folder of an exported model: the names of its files and tensors, and which tensor is in which file.

The trunk is one part of the model and each block of experts another: a part comes from one replica, as it was at one
moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from node.model.gate import GATE_BIAS
from node.model.moe import LocalExperts
from node.model.replica_state import TensorSchema
from node.trainer.train_step import build_transformer
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from node.model.transformer import Transformer
    from protocol.manifest import BlockId, Manifest

T = TypeVar("T")

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
CODE: Final = ("modeling_kilohive.py", "kilohive_experts.py", "kilohive_gates.py")
"""The files with the model's code; the first has the classes that `config.json` names."""

CARD: Final = "README.md"
GENERATION: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"

SIGNS: Final = "codes.signs_VD"
MEAN_LOAD: Final = "mean_load_E"


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """The trunk, or a block of experts, as tensors of the folder."""

    id: BlockId
    tensors: tuple[TensorSchema, ...]

    @property
    def n_bytes(self) -> int:
        """Its size in the files."""
        return sum(map(n_bytes, self.tensors))


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Parts that are written together, to `files` by name: several small ones to one, or a large one to several.

    No file has tensors of two groups, so that a part whose file is lost is fetched and written again as a whole.
    """

    parts: tuple[ModelPart, ...]
    files: tuple[tuple[str, tuple[TensorSchema, ...]], ...]


def n_bytes(tensor: TensorSchema) -> int:
    """The size of a tensor in its file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def file_name(number: int, total: int) -> str:
    """The name of file `number` of `total`, counted from 1, as transformers has it."""
    return f"model-{number:05}-of-{total:05}.safetensors"


def expert_tensor(block_id: BlockId, parameter: str) -> str:
    """The name of a parameter of a block's experts, stacked."""
    return f"layers.{block_id.layer}.moe.experts.{block_id.block}.{parameter}"


def trunk_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """All of a trunk that inference computes with, by name: what is trained, and what was drawn from the run's seed.

    Signs of codes become int8, which holds them exactly.
    """
    read = {name: buffer for name, buffer in model.named_buffers() if _is_read(name, model)}
    found = {**dict(model.named_parameters()), **read}
    return {name: t.detach().to(torch.int8) if name == SIGNS else t.detach() for name, t in found.items()}


def meta_model(manifest: Manifest) -> tuple[Transformer, LocalExperts]:
    """A run's whole model as names, shapes and types: without memory for any number."""
    with torch.device("meta"):
        experts = LocalExperts(manifest, torch.device("meta"))
        return build_transformer(manifest, experts, torch.Generator("cpu")), experts


def parts_of(manifest: Manifest) -> tuple[ModelPart, ...]:
    """The trunk and every block, in the order in which they are written. Allocates no weights."""
    model, experts = meta_model(manifest)
    blocks = [
        (block.id, {expert_tensor(block.id, name): t for name, t in block.params.items()})
        for of_layer in experts.blocks.values()
        for block in of_layer
    ]
    return tuple(_part(*of) for of in ((TRUNK, trunk_tensors(model)), *blocks))


def groups_of(parts: Iterable[ModelPart], max_bytes: int) -> tuple[FileGroup, ...]:
    """The files, none of more than `max_bytes` of tensors unless a single tensor is larger."""
    together = _packed(parts, lambda part: part.n_bytes, max_bytes)
    contents = [_packed((t for part in of for t in part.tensors), n_bytes, max_bytes) for of in together]
    total = sum(map(len, contents))
    names = iter([file_name(number, total) for number in range(1, total + 1)])
    return tuple(
        FileGroup(parts=tuple(of), files=tuple((next(names), tuple(tensors)) for tensors in files))
        for of, files in zip(together, contents, strict=True)
    )


def _packed(items: Iterable[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Neighbours together, up to `most`; an item that is larger stands alone."""
    packed: list[list[T]] = []
    room = 0
    for item in items:
        if packed and size(item) <= room:
            packed[-1].append(item)
        else:
            packed.append([item])
            room = most
        room -= size(item)
    return packed


def _is_read(buffer: str, model: Transformer) -> bool:
    """Training alone reads a gate's memory of loads, and a gate without parameters reads no biases."""
    name = buffer.rpartition(".")[2]
    return name != MEAN_LOAD and (name != GATE_BIAS or _has_parameters(model, buffer.removesuffix(f".{GATE_BIAS}")))


def _has_parameters(model: Transformer, module: str) -> bool:
    return next(model.get_submodule(module).parameters(), None) is not None


def _part(block_id: BlockId, tensors: Mapping[str, torch.Tensor]) -> ModelPart:
    found = sorted(tensors.items())
    return ModelPart(id=block_id, tensors=tuple(TensorSchema(name, tuple(t.shape), t.dtype) for name, t in found))
