"""A block as named tensors and back: checkpoints now, transfers between replicas by the same names.

Shapes: E experts of the block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from node.experts.block import Block, new_block
from protocol.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.manifest import BlockId, Manifest


def block_tensors(block: Block) -> dict[str, torch.Tensor]:
    """Copies of weights, moments and step counters: safe to write while training goes on."""
    tensors = {f"params.{name}": p for name, p in block.params.items()}
    tensors |= {f"first.{name}": m for name, m in block.adam.first.items()}
    tensors |= {f"second.{name}": v for name, v in block.adam.second.items()}
    return {name: t.detach().clone() for name, t in {**tensors, "steps_E": block.adam.steps_E}.items()}


def block_metadata(block: Block, run_id: str) -> dict[str, str]:
    """What a reader checks before it believes the tensors."""
    return {"run_id": run_id, "block": str(block.id), "version": str(block.version)}


def restore_block(
    manifest: Manifest,
    block_id: BlockId,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    device: torch.device,
) -> Block:
    """Block from `block_tensors`; raises CheckpointError naming what does not fit this run."""
    block = new_block(manifest, block_id, device)
    _check_metadata(metadata, manifest.run_id, block_id)
    current = block_tensors(block)
    if set(tensors) != set(current):
        raise CheckpointError(f"block {block_id}: has tensors {sorted(tensors)}, must have {sorted(current)}")
    for name, tensor in tensors.items():
        _check_tensor(f"block {block_id} {name}", tensor, current[name])
    for group, store in (("params", block.params), ("first", block.adam.first), ("second", block.adam.second)):
        for name in store:
            store[name] = tensors[f"{group}.{name}"].to(device)
    block.adam.steps_E = tensors["steps_E"].to(device)
    block.version = int(metadata["version"])
    return block


def _check_metadata(metadata: Mapping[str, str], run_id: str, block_id: BlockId) -> None:
    for name, wanted in (("run_id", run_id), ("block", str(block_id))):
        if metadata.get(name) != wanted:
            raise CheckpointError(f"block {block_id}: its {name} is {metadata.get(name)!r}, must be {wanted!r}")
    if not metadata.get("version", "").isdecimal():
        raise CheckpointError(f"block {block_id}: its version is {metadata.get('version')!r}, must be a number")


def _check_tensor(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise CheckpointError(
            f"{name}: is {tuple(tensor.shape)} {tensor.dtype}, must be {tuple(like.shape)} {like.dtype}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: holds NaN or infinity")
