"""A block as named tensors and back: one form for checkpoints, for averaging and for peers that download a block.

Shapes: E experts of the block, which are the R rows of its `ReplicaState`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.errors import CheckpointError, InvalidInputError, LimitExceededError
from node.model.experts.adam import AdamState
from node.model.experts.block import Block, new_block
from node.model.replica_state import GROUPS, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.manifest import BlockId, Manifest

MAX_STEPS = 1 << 48
"""Optimizer steps that a block or an expert may say it has taken: no run gets there, and no counter overflows soon."""

_STEPS = "steps_E"
_MAX_VERSION_DIGITS = 15


def block_state(block: Block) -> ReplicaState:
    """The block's own tensors, not copies; touch them only on the thread that owns the block."""
    return ReplicaState(
        params=block.params,
        first=block.adam.first,
        second=block.adam.second,
        steps_R=block.adam.steps_E,
        learnt_R=block.learnt_E,
        version=block.version,
    )


def block_from_state(manifest: Manifest, block_id: BlockId, state: ReplicaState, device: torch.device) -> Block:
    """Block that takes over `state`'s tensors; it has learnt from nothing here yet, so `learnt_E` begins at 0.

    Raises:
        InvalidInputError: for a tensor or counter that does not fit this run, or that Adam could not go on from.
    """
    block = new_block(manifest, block_id, device)
    _check_state(state, block_state(block))
    params, first, second = ({name: t.to(device) for name, t in tensors.items()} for _, tensors in state.groups())
    block.params = params
    block.adam = AdamState(first=first, second=second, steps_E=state.steps_R.to(device))
    block.version = state.version
    return block


def block_tensors(block: Block) -> dict[str, torch.Tensor]:
    """Copies of weights, moments and step counters: safe to write while training goes on."""
    state = block_state(block)
    return {name: t.detach().clone() for name, t in {**state.named(), _STEPS: state.steps_R}.items()}


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
    _check_metadata(metadata, manifest.run_id, block_id)
    try:
        return block_from_state(manifest, block_id, _state_from(tensors, int(metadata["version"])), device)
    except InvalidInputError as error:
        raise CheckpointError(f"block {block_id}: {error}") from None


def _state_from(tensors: Mapping[str, torch.Tensor], version: int) -> ReplicaState:
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
    for name in tensors.keys() - {_STEPS}:
        group, _, parameter = name.partition(".")
        if group not in groups:
            raise InvalidInputError("tensors", f"{name!r} belongs to no block")
        groups[group][parameter] = tensors[name]
    if _STEPS not in tensors:
        raise InvalidInputError(_STEPS, "is missing, a block must have it")
    return ReplicaState(
        params=groups["params"],
        first=groups["first"],
        second=groups["second"],
        steps_R=tensors[_STEPS],
        learnt_R=torch.zeros(tensors[_STEPS].shape, dtype=torch.float64),
        version=version,
    )


def _check_metadata(metadata: Mapping[str, str], run_id: str, block_id: BlockId) -> None:
    for name, wanted in (("run_id", run_id), ("block", str(block_id))):
        if metadata.get(name) != wanted:
            raise CheckpointError(f"block {block_id}: its {name} is {metadata.get(name)!r}, must be {wanted!r}")
    version = metadata.get("version", "")
    if not version.isdecimal() or len(version) > _MAX_VERSION_DIGITS:
        raise CheckpointError(f"block {block_id}: its version is {version[:40]!r}, must be a number")


def _check_state(state: ReplicaState, like: ReplicaState) -> None:
    found, wanted = state.named(), like.named()
    if found.keys() != wanted.keys():
        raise InvalidInputError("tensors", f"are {sorted(found)}, must be {sorted(wanted)}")
    for name, tensor in found.items():
        _check_tensor(name, tensor, wanted[name])
    for name, second in state.second.items():
        # Adam takes its root.
        if bool((second < 0).any()):
            raise InvalidInputError(f"second.{name}", "holds a negative number, must hold means of squares")
    _check_tensor("steps", state.steps_R, like.steps_R)
    if bool((state.steps_R < 0).any()):
        raise InvalidInputError("steps", f"holds {int(state.steps_R.min())}, must not be negative")
    for field, value in (("steps", int(state.steps_R.max())), ("version", state.version)):
        if value > MAX_STEPS:
            raise LimitExceededError(field, value, MAX_STEPS)
    if state.version < 0:
        raise InvalidInputError("version", f"is {state.version}, must not be negative")


def _check_tensor(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise InvalidInputError(
            name, f"is {tuple(tensor.shape)} {tensor.dtype}, must be {tuple(like.shape)} {like.dtype}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InvalidInputError(name, "holds NaN or infinity")
