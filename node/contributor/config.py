"""What a person can set on a contributor. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from node.membership.config import CallerConfig


@dataclass(frozen=True, kw_only=True)
class ContributeConfig(CallerConfig):
    """Fetch an expert to train at home, and offer what came of it to the run."""

    file: tyro.conf.Positional[Path] = Path("expert.safetensors")
    """Read the expert from this safetensors file, or write it there."""
    layer: int = 0
    """Name the expert's layer, counted from 0."""
    expert: int = 0
    """Name the expert's index in its layer, counted from 0."""
    fetch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the run's present expert into the file and offer nothing."""
    train: int = 0
    """Train the file's expert, or the present one, for so many steps and offer nothing."""
    data: Path | None = None
    """Train on this text, a file or a folder; otherwise on Wikipedia."""
    tokenizer: FileOnly[str] = ""
    """Read the run's tokenizer from this file; otherwise from this machine's cache or from a trainer."""
    batch: FileOnly[int] = 16
    """Train on this many windows of text in a step."""
    lr: float = 0.0
    """Start at this learning rate, which falls to 0; 0 starts at the run's present one."""
    seed: FileOnly[int] = 0
    """Draw the order in which text is read with this seed."""
    device: str = "auto"
    """Compute the trunk on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads."""
    timeout_s: FileOnly[float] = 3600.0
    """Wait this many seconds until the offer is evaluated and taken in."""
