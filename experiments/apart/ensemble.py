"""Participants of a course put together: as one model, or as an ensemble of whole models.

In the one the trunks are averaged and the experts side by side; in the other predictions are weighted by how well each
participant has predicted the window so far.

Shapes: P participants, B windows, T positions, V byte values, N windows in all, E experts of a layer.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from common.errors import CheckpointError
from node.host.block_store import block_path
from node.model.checkpoint import read_checkpoint, write_checkpoint
from node.model.gate import build_gate
from node.trainer.trunk_state import FILE_NAME
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from experiments.apart.branches import BranchSchedule
    from experiments.arms.training import Model
    from node.data import TextDataset


def merge(course: BranchSchedule, folders: Sequence[Path], into: Path) -> Path:
    """Write one model: the mean of the trunks and of their moments, and from each its experts and their gates' rows."""
    parts = [read_checkpoint(folder / FILE_NAME) for folder in folders]
    if None in parts:
        raise CheckpointError(f"{folders[parts.index(None)]}: holds no model; delete it, and run the experiment again")
    trunks = [tensors for tensors, _ in filter(None, parts)]
    metadata = next(metadata for _, metadata in filter(None, parts))
    names = trunks[0].keys()
    tensors = {name: _together(name, [t[name] for t in trunks], course.arm.experts) for name in names}
    write_checkpoint(into / FILE_NAME, tensors, metadata)
    for participant, folder in enumerate(folders):
        for layer in range(course.layers if course.arm.experts else 0):
            _link(folder, into, BlockId(layer, participant))
    return into


def _together(name: str, tensors: Sequence[torch.Tensor], n_experts: int) -> torch.Tensor:
    """Rows of a gate from whoever holds their experts; the mean of everything else."""
    if n_experts and ".gate." in name and tensors[0].shape[:1] == (n_experts,):
        own = n_experts // len(tensors)
        return torch.cat([tensor[index * own : (index + 1) * own] for index, tensor in enumerate(tensors)])
    return torch.stack(list(tensors)).mean(0)


def _link(folder: Path, into: Path, block: BlockId) -> None:
    """Share a file, which is never written in place."""
    target = block_path(into, block)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(block_path(folder, block), target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(block_path(folder, block), target)


def forget_gates(model: Model, seed: int) -> None:
    """Give every layer a gate that has learnt nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        layer.gate.load_state_dict(build_gate(model.manifest.model, generator).state_dict())


def by_posterior(log_p_PNT: torch.Tensor) -> torch.Tensor:
    """Nats per byte [N] of the mixture that weighs each participant by the likelihood of the window's bytes so far."""
    log_w_PNT = functional.log_softmax(log_p_PNT.cumsum(2) - log_p_PNT, 0)
    return -torch.logsumexp(log_w_PNT + log_p_PNT, 0).mean(1)


def evenly_weighted(log_p_PNT: torch.Tensor) -> torch.Tensor:
    """Nats per byte [N] of the mixture in which all count alike."""
    return -(torch.logsumexp(log_p_PNT, 0) - math.log(len(log_p_PNT))).mean(1)


def held_out(course: BranchSchedule, dataset: TextDataset) -> Iterable[torch.Tensor]:
    """The windows that every arm is measured on."""
    return dataset.held_out_batches(course.batch, course.context, course.final_eval_bytes)
