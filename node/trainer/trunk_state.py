"""The trunk's checkpoint: weights, gate biases, optimizer moments, place in the data. One file per trainer."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from node.model.checkpoint import read_checkpoint, write_checkpoint
from node.trainer.reading import METADATA_KEY, change_since, reading_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from node.model.trunk import Trunk
    from node.trainer.train_step import Training

logger = logging.getLogger(__name__)

FILE_NAME = "trunk.safetensors"


@dataclass(kw_only=True)
class TrainingProgress:
    """What a resumed run goes on counting. `run_tokens` are the whole run's; `trainers` the other trainers' own tokens.

    `step` counts this trainer's steps, `version` the trunk's, which averaging with further ones moves ahead.
    """

    step: int = 0
    version: int = 0
    run_tokens: int = 0
    own_tokens: int = 0
    trainers: dict[str, int] = field(default_factory=dict)
    bits_per_byte_start: float | None = None
    calls_failed: int = 0
    calls_ok: int = 0
    wire_bytes: int = 0
    train_seconds: float = 0.0
    wall_s: float = 0.0


def save_trunk(folder: Path, training: Training, progress: TrainingProgress) -> None:
    """Write weights, moments and `progress`; raises CheckpointError."""
    tensors = {f"model.{name}": t for name, t in training.model.state_dict().items()}
    names = [name for name, p in training.model.named_parameters() if p.requires_grad]
    for name, parameter in zip(names, training.parameters, strict=True):
        for key, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    metadata = {
        "run_id": training.manifest.run_id,
        "progress": json.dumps(asdict(progress)),
        METADATA_KEY: json.dumps(reading_of(training)),
    }
    write_checkpoint(folder / FILE_NAME, tensors, metadata)


def stored_step(folder: Path) -> int | None:
    """The step after which the trunk in `folder` was stored; None if there is none, or none that can be read."""
    try:
        stored = read_checkpoint(folder / FILE_NAME)
        return None if stored is None else int(json.loads(stored[1]["progress"])["step"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def load_trunk(folder: Path, training: Training) -> TrainingProgress | None:
    """Restore what `save_trunk` wrote; None if there is none. CheckpointError for another run's or a damaged one.

    Where the training reads its text otherwise than the one that wrote it, a warning says so.
    """
    stored = read_checkpoint(folder / FILE_NAME)
    if stored is None:
        return None
    tensors, metadata = stored
    progress = _restore_model(folder, training.model, training.manifest.run_id, tensors, metadata)
    for name, parameter in training.model.named_parameters():
        state = {
            key.removeprefix("optimizer.").removesuffix(f".{name}"): value
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        if state:
            device = parameter.device
            training.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(device) for key, value in state.items()
            }
    if change := change_since(metadata, training):
        logger.warning("%s: %s", folder / FILE_NAME, change)
    training.steps_done, training.version = progress.step, progress.version
    training.run_tokens, training.own_tokens = progress.run_tokens, progress.own_tokens
    return progress


def load_trunk_weights(folder: Path, model: Trunk, run_id: str) -> TrainingProgress:
    """Weights only, for evaluation and sampling; raises CheckpointError if there is no checkpoint."""
    stored = read_checkpoint(folder / FILE_NAME)
    if stored is None:
        raise CheckpointError(f"no trunk checkpoint in {folder}: train first, or name the trainer's folder with --out")
    return _restore_model(folder, model, run_id, *stored)


def _restore_model(
    folder: Path, model: Trunk, run_id: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> TrainingProgress:
    where = folder / FILE_NAME
    if metadata.get("run_id") != run_id:
        raise CheckpointError(
            f"{where} belongs to run {metadata.get('run_id')!r}, not to {run_id!r}: choose another folder with --out"
        )
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    try:
        model.load_state_dict(weights)
        return TrainingProgress(**json.loads(metadata["progress"]))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not fit this run: {str(error)[:300]}") from None
