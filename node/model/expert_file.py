"""One expert as a safetensors file: what a contributor trains at home and offers, and what is checked of its bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from common.errors import InvalidInputError, LimitExceededError
from node.model.experts.kinds import expert_kind
from protocol.limits import MAX_MESSAGE_BYTES
from protocol.manifest import BlockId
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.manifest import Manifest, ModelConfig

    Weights = dict[str, torch.Tensor]

SAFETENSORS_DTYPES = {"fp32": "F32", "fp64": "F64"}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4096
MAX_FILE_BYTES = MAX_MESSAGE_BYTES
"""Experts are tiny; a run of larger ones takes no offers. A trainer holds several files at once."""


class ExpertId(NamedTuple):
    """Expert `expert` of layer `layer`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"

    def check(self, model: ModelConfig) -> None:
        """Raise InvalidInputError if the run has no such expert."""
        if not (0 <= self.layer < model.n_layers and 0 <= self.expert < model.experts_per_layer):
            grid = f"{model.n_layers} layers of {model.experts_per_layer} experts, counted from 0"
            raise InvalidInputError("layer, expert", f"are {self.layer}, {self.expert}; the run has {grid}")

    def block(self, model: ModelConfig) -> BlockId:
        """The block that it belongs to."""
        return BlockId(self.layer, self.expert // model.experts_per_block)

    def row(self, model: ModelConfig) -> int:
        """The expert's row in its block's stacked tensors."""
        return self.expert % model.experts_per_block

    def made_live(self, layer: int, live_E: torch.Tensor) -> torch.Tensor:
        """Experts of `layer` that can be called if this one is computed here, whichever peers are up."""
        if layer == self.layer:
            live_E = live_E.clone()
            live_E[self.expert] = True
        return live_E


def expert_file(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file that `read_expert` takes."""
    return save({name: t.detach().cpu().contiguous() for name, t in weights.items()}, dict(metadata))


def read_expert(data: bytes, manifest: Manifest) -> Weights:
    """The weights of one expert of the run, every number finite.

    Names, types, shapes and length are compared with the manifest before a tensor is made. InvalidInputError names
    what is wrong; LimitExceededError where it is too long.
    """
    check_size(len(data), manifest)
    header = _header(data)
    header.pop("__metadata__", None)
    wanted = _wanted(manifest)
    if header.keys() != wanted.keys():
        raise InvalidInputError("file", f"holds other tensors than {', '.join(sorted(wanted))}")
    for name, expected in wanted.items():
        entry = header[name]
        if not isinstance(entry, dict) or {key: entry.get(key) for key in expected} != expected:
            raise InvalidInputError(f"file.{name}", f"is not {expected['dtype']} of shape {expected['shape']}")
    return _finite_tensors(data)


def metadata_of(data: bytes) -> dict[str, str]:
    """What a file says of itself; empty if it says nothing. Raises InvalidInputError for another kind of file."""
    told = _header(data).get("__metadata__")
    return {name: text for name, text in told.items() if isinstance(text, str)} if isinstance(told, dict) else {}


def max_file_bytes(manifest: Manifest) -> int:
    """The longest file that `read_expert` takes."""
    size = DTYPES[manifest.dtype].itemsize
    whole = LENGTH_BYTES + MAX_HEADER_BYTES + size * sum(torch.Size(shape).numel() for shape in _shapes(manifest))
    return min(whole, MAX_FILE_BYTES)


def check_size(n_bytes: int, manifest: Manifest) -> None:
    """Raise LimitExceededError for a file that is too long for an expert of the run."""
    if n_bytes > max_file_bytes(manifest):
        raise LimitExceededError("file bytes", n_bytes, max_file_bytes(manifest))


def _shapes(manifest: Manifest) -> list[tuple[int, ...]]:
    return list(expert_kind(manifest.model.expert_kind).shapes(manifest.model).values())


def _wanted(manifest: Manifest) -> dict[str, dict[str, Any]]:
    shapes = expert_kind(manifest.model.expert_kind).shapes(manifest.model)
    dtype = SAFETENSORS_DTYPES[manifest.dtype]
    return {name: {"dtype": dtype, "shape": list(shape)} for name, shape in shapes.items()}


def _header(data: bytes) -> dict[str, Any]:
    n = int.from_bytes(data[:LENGTH_BYTES], "little")
    if n > MAX_HEADER_BYTES:
        raise LimitExceededError("file.header bytes", n, MAX_HEADER_BYTES)
    try:
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + n])
    except (ValueError, RecursionError):
        raise InvalidInputError("file.header", "is not that of a safetensors file") from None
    if not isinstance(header, dict):
        raise InvalidInputError("file.header", "is not that of a safetensors file")
    return header


def _finite_tensors(data: bytes) -> Weights:
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InvalidInputError("file", f"is no safetensors file: {str(error)[:100]}") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"file.{name}", "holds a number that is not finite")
    return tensors
