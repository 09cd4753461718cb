"""What a person can set on a trainer, and on the commands that use what it trained. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from node.membership.config import SwarmConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SwarmConfig):
    """Train the run's trunk and gate over the swarm's experts."""

    out: Path = Path("runs/train")
    """Folder for checkpoint, event log, summary, plot."""
    data: Path | None = None
    """Text, JSON-lines or folder of them; else Wikipedia."""
    steps: int = 0
    """Steps to train to; 0: until the run's last token."""
    batch: int = 8
    """Sequences per micro-batch."""
    micro_batches: int = 2
    """Micro-batches per step; more hide a slow network."""
    in_flight: int = 0
    """Micro-batches at once; 0: as few as is no slower."""
    shard: int = 0
    """Shard of the corpus to read, from 0."""
    n_shards: int = 1
    """Number of shards: one per trainer."""
    wait_for_blocks_s: float = 15.0
    """Seconds to wait at the start for every block."""
    k_min: int = 1
    """Fewest experts that must answer for each token."""
    call_timeout_s: float = 20.0
    """Deadline of one call to a host."""
    hedge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask a second replica too when a call is late."""
    port: int = 0
    """Port of the trunk's gRPC server; 0 takes a free one."""
    eval_every: int = 50
    """Steps between held-out evaluations; 0: only at the start and the end."""
    eval_bytes: int = 16_384
    """Held-out bytes per evaluation on the way; start and end use four times as many."""
    save_every: int = 100
    """Steps between checkpoints of the trunk."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the trunk's checkpoint in --out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """CPU threads for the trunk's arithmetic."""
    seed: int = 0
    """Seed of the order of the data and of the sample."""
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print lines instead of the live display."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SwarmConfig):
    """Measure held-out bits per byte of a run, with the trunk from a checkpoint and the swarm's experts."""

    out: Path = Path("runs/local")
    """Folder with the trunk's checkpoint."""
    data: Path | None = None
    """Text, JSON-lines or folder of them; else Wikipedia."""
    n_bytes: int = 65_536
    """Held-out bytes to score."""
    batch: int = 16
    """Sequences at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """CPU threads for the trunk."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SwarmConfig):
    """Let a run's model write text, with the trunk from a checkpoint and the swarm's experts."""

    out: Path = Path("runs/local")
    """Folder with the trunk's checkpoint."""
    prompt: str = "The "
    """Text to go on from."""
    n_bytes: int = 256
    """Bytes to write."""
    temperature: float = 0.8
    """0 always takes the likeliest byte; higher is wilder."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """CPU threads for the trunk."""
