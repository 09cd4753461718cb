"""What is in the folder of an exported model: the names of its files and tensors, and which tensor is in which file.

The trunk is one part of the model and each block of experts another: a part comes from one replica, as it was at one
moment. What stays as it was of a pretrained model comes from its files, in pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import torch

from node.model.gate import GATE_BIAS
from node.model.moe import LocalExperts
from node.model.replica_state import TensorSchema
from node.trainer.train_step import build_model
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from transformers import PreTrainedModel

    from node.model.trunk import Trunk
    from protocol.manifest import BlockId, Manifest, ModelConfig

T = TypeVar("T")

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
CODE: Final = {
    "transformer": ("modeling_kilohive.py", "kilohive_experts.py", "kilohive_gates.py"),
    "hf": ("modeling_kilohive_pretrained.py", "kilohive_experts.py", "kilohive_gates.py"),
}
"""The files with a model's code, by its trunk; the first has the classes that `config.json` names."""

CARD: Final = "README.md"
GENERATION: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template"
"""What `tokenizer_config.json` has if the model knows how a chat is written."""

SIGNS: Final = "codes.signs_VD"
MEAN_LOAD: Final = "mean_load_E"

PRETRAINED: Final = "language_model."
"""What names of a pretrained model's own tensors begin with; what follows are the names that it has for them."""

PIECE_BYTES: Final = 1 << 26
"""Tensors of a pretrained model that are read and written together, unless a single one is larger."""


class PretrainedPiece(NamedTuple):
    """Some of what stays as it was of a pretrained model, counted from 0."""

    number: int

    def __str__(self) -> str:
        return f"pretrained/{self.number}"


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """The trunk, a block of experts, or a piece of a pretrained model, as tensors of the folder."""

    id: BlockId | PretrainedPiece
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


def expert_tensor(model: ModelConfig, block_id: BlockId, parameter: str) -> str:
    """The name of a parameter of a block's experts, stacked."""
    layer = f"moe_layers.{block_id.layer}" if model.trunk == "hf" else f"layers.{block_id.layer}.moe"
    return f"{layer}.experts.{block_id.block}.{parameter}"


def trunk_places(model: Trunk) -> dict[str, torch.Tensor]:
    """All of a trunk that inference computes with, by name: what is trained, and what was drawn from the run's seed.

    Of a pretrained model it is what the run trains. The tensors are the trunk's own.
    """
    found = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if _is_read(n, model)}}
    own = {name: tensor for name, tensor in found.items() if not name.startswith("_")}
    return {**own, **{f"{PRETRAINED}{name}": parameter for name, parameter in model.unfrozen.items()}}


def trunk_tensors(model: Trunk) -> dict[str, torch.Tensor]:
    """What is at `trunk_places`, as it is written: signs of codes become int8, which holds them exactly."""
    places = trunk_places(model)
    return {name: t.detach().to(torch.int8) if name == SIGNS else t.detach() for name, t in places.items()}


def meta_model(manifest: Manifest, pretrained: PreTrainedModel | None = None) -> tuple[Trunk, LocalExperts]:
    """A run's whole model as names, shapes and types, without memory for any number.

    Of a run around a pretrained model `pretrained` is the outline of that.
    """
    with torch.device("meta"):
        experts = LocalExperts(manifest, torch.device("meta"))
        return build_model(manifest, experts, torch.Generator("cpu"), pretrained), experts


def parts_of(manifest: Manifest, pretrained: PreTrainedModel | None = None) -> tuple[ModelPart, ...]:
    """The trunk, every block and the pretrained model, in the order in which they are written. Allocates no weights.

    `pretrained` is as in `meta_model`. DataError where it and the manifest do not fit each other.
    """
    model, experts = meta_model(manifest, pretrained)
    blocks = [
        (block.id, {expert_tensor(manifest.model, block.id, name): t for name, t in block.params.items()})
        for of_layer in experts.blocks.values()
        for block in of_layer
    ]
    parts = tuple(_part(*of) for of in ((TRUNK, trunk_tensors(model)), *blocks))
    return parts if pretrained is None else (*parts, *_pieces(pretrained, model.unfrozen.keys()))


def _pieces(pretrained: PreTrainedModel, unfrozen: AbstractSet[str]) -> Iterable[ModelPart]:
    from node.model.pretrained_outline import frozen_tensors  # noqa: PLC0415 - as in `train_step.build_trunk`

    frozen = frozen_tensors(pretrained, unfrozen)
    schemas = [TensorSchema(f"{PRETRAINED}{name}", tuple(t.shape), t.dtype) for name, t in frozen.items()]
    packed = _packed(schemas, n_bytes, PIECE_BYTES)
    return (ModelPart(id=PretrainedPiece(number), tensors=tuple(tensors)) for number, tensors in enumerate(packed))


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


def _is_read(buffer: str, model: Trunk) -> bool:
    """Training alone reads a gate's memory of loads, and a gate without parameters reads no biases."""
    name = buffer.rpartition(".")[2]
    return name != MEAN_LOAD and (name != GATE_BIAS or _has_parameters(model, buffer.removesuffix(f".{GATE_BIAS}")))


def _has_parameters(model: Trunk, module: str) -> bool:
    return next(model.get_submodule(module).parameters(), None) is not None


def _part(block_id: BlockId, tensors: Mapping[str, torch.Tensor]) -> ModelPart:
    found = sorted(tensors.items())
    return ModelPart(id=block_id, tensors=tuple(TensorSchema(name, tuple(t.shape), t.dtype) for name, t in found))
