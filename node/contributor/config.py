"""What a person can set on a contributor. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from node.membership.config import SwarmConfig


@dataclass(frozen=True, kw_only=True)
class ContributeConfig(SwarmConfig):
    """Fetch an expert to train at home, and offer what came of it to the run."""

    file: tyro.conf.Positional[Path] = Path("expert.safetensors")
    """The expert, as a safetensors file."""
    layer: int = 0
    """Its layer, from 0."""
    expert: int = 0
    """Its index within the layer, from 0."""
    fetch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the present expert into the file; offer nothing."""
    train: int = 0
    """Train the file's expert, or the present one, for so many steps; offer nothing."""
    data: Path | None = None
    """Text to train it on, a file or folder; else the default corpus."""
    batch: int = 16
    """Windows of text in one of those steps."""
    lr: float = 0.0
    """First learning rate, which falls to 0; 0: the run's own of now."""
    seed: int = 0
    """Of the order in which text is read."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps: where the trunk computes."""
    threads: int = 1
    """CPU threads."""
    timeout_s: float = 3600.0
    """Seconds to wait until it is evaluated and taken in."""
