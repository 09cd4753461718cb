"""What a person can set on `health`. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - tyro reads the annotation

from common.folders import state_folder
from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation


def host_folder() -> Path:
    """Where a host has its files unless it is told otherwise: whoever asks or steers it looks there, too."""
    return state_folder("host")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Ask the node of a folder on this machine whether it serves."""

    state: Path = field(default_factory=host_folder)
    """Ask the node of this folder: a host's --state, a trainer's or a coordinator's --out."""
    timeout_s: float = 3.0
    """Wait this many seconds for its answer."""
    insecure_local: FileOnly[bool] = False
    """Call without encryption, as a node with insecure_local expects it."""
