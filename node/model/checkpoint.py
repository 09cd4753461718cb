"""Checkpoints as safetensors, written atomically, the previous one kept. Blocks on hosts and the trunk on trainers.

A file `NAME.safetensors` is replaced by temp file, fsync, rename; what it replaced is `NAME.previous.safetensors`,
which a reader falls back to when the newest is damaged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.atomic_file import write_atomically
from common.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PREVIOUS_SUFFIX = f".previous{SUFFIX}"


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata`; raises CheckpointError in one sentence, leaving the old file as it was."""
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, dict(metadata))
    try:
        write_atomically(path, data, keep=previous_path(path))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot write checkpoint {path}: {reason}; the previous one is untouched") from error


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Tensors and metadata of the newest readable of `path` and its predecessor; None if neither file exists.

    Raises CheckpointError when files exist but none can be read.
    """
    failures = []
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        try:
            return _read(candidate)
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("Checkpoint %s is damaged (%s); trying the previous one", candidate, error)
            failures.append(f"{candidate.name}: {error}")
    if failures:
        raise CheckpointError(
            f"cannot read checkpoint {path} ({'; '.join(failures)[:300]}): restore it, or delete it to start afresh"
        )
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata alone of the newest readable of `path` and its predecessor; empty if there is none."""
    for candidate in (path, previous_path(path)):
        try:
            with safe_open(candidate, framework="pt") as file:
                return file.metadata() or {}
        except (SafetensorError, OSError, ValueError):
            continue
    return {}


def previous_path(path: Path) -> Path:
    """Return where the checkpoint that `path` replaced is kept."""
    return path.with_name(path.name.removesuffix(SUFFIX) + PREVIOUS_SUFFIX)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict
