"""What a person can set on a trainer, and on the commands that use what it trained. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.config import EventLogConfig
from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from node.credit.config import ProfileConfig
from node.membership.config import CallerConfig, ReachConfig, SwarmConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EventLogConfig, ProfileConfig, ReachConfig, SwarmConfig):
    """Train the run's trunk and gate over the swarm's experts."""

    out: Path = Path("runs/train")
    """Write checkpoint, event log, summary and plot to this folder."""
    data: Path | None = None
    """Read this text, JSON-lines or Parquet file or folder; otherwise Wikipedia."""
    tokenizer: FileOnly[str] = ""
    """Read the run's tokenizer from this file; otherwise from this machine's cache or from another trainer."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Refuse text with a bad row instead of skipping that."""
    steps: int = 0
    """Train to this step; 0 trains to the run's last token."""
    batch: int = 8
    """Put this many sequences into a micro-batch."""
    micro_batches: int = 2
    """Put this many micro-batches into a step; more hide a slow network."""
    in_flight: FileOnly[int] = 0
    """Have this many micro-batches under way at once; 0 takes as few as is no slower."""
    shard: int = 0
    """Read this shard of the corpus, counted from 0."""
    n_shards: int = 1
    """Split the corpus into this many shards, one for each trainer."""
    wait_for_blocks_s: float = 15.0
    """Wait this many seconds at the start for every block."""
    k_min: FileOnly[int] = 1
    """Require answers from at least this many experts for each token."""
    call_timeout_s: FileOnly[float] = 20.0
    """Give one call to a host this many seconds."""
    hedge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask a second replica too when a call is late."""
    port: int = 0
    """Use this port for the trunk's gRPC server; 0 takes a free one."""
    eval_every: int = 50
    """Evaluate after so many steps; 0 only at start and end."""
    eval_bytes: FileOnly[int] = 16_384
    """Evaluate on this many held-out bytes on the way, and on four times as many at start and end."""
    save_every: int = 100
    """Save the trunk after so many steps."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the trunk's checkpoint in --out."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the trunk's arithmetic."""
    seed: int = 0
    """Draw the order of the data and the sample with this seed."""
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print lines instead of the live display."""
    metrics_port: FileOnly[int] = 0
    """Serve Prometheus metrics at this port; 0 serves none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a tokenizer on text: byte-level pairs, for a run to come."""

    vocab_size: int = 4096
    """Give it this many tokens."""
    data: Path | None = None
    """Train it on this text, a file or a folder; otherwise on Wikipedia."""
    out: Path = Path("tokenizer.json")
    """Write it to this file."""
    seed: int = 0
    """Leave out the text that a run of this seed holds out."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Show or empty what this machine keeps of prepared text, and of runs' tokenizers and models."""

    clear: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete all of it that no process uses now."""


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(CallerConfig):
    """Where a trained model is from, for a command that uses it and trains nothing."""

    out: Path | None = None
    """Take the trunk from this trainer's folder instead of a live trainer."""
    export: Path | None = None
    """Take the whole model from this folder, as `export` wrote it, and no swarm."""
    tokenizer: FileOnly[str] = ""
    """Read the run's tokenizer from this file; otherwise from this machine's cache or from a trainer."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainedModelConfig):
    """Measure held-out bits per byte of a run, with the trunk of a trainer and the swarm's experts."""

    data: Path | None = None
    """Read this text, JSON-lines or Parquet file or folder; otherwise Wikipedia."""
    n_bytes: int = 65_536
    """Score this many held-out bytes."""
    batch: int = 16
    """Score this many sequences at once."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the trunk."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TrainedModelConfig):
    """Let a run's model write text, with the trunk of a trainer and the swarm's experts."""

    prompt: str = "The "
    """Go on from this text."""
    n_tokens: int = 256
    """Write this many tokens, which are bytes unless the run has a tokenizer."""
    temperature: float = 0.8
    """Write more freely with a higher value; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that are so probable together."""
    stop: tuple[str, ...] = ()
    """End a text before the first of these that it comes to."""
    n: int = 1
    """Write this many texts at once."""
    seed: int = 0
    """Draw the tokens of the first text with this seed, of the second with the next."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the trunk."""
    wait_for_experts_s: FileOnly[float] = 60.0
    """Wait up to this many seconds in mid-text for hosts that have gone."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(TrainedModelConfig):
    """Show what each expert of a trained model is chosen for, what its layer tells of topics, and what it is worth."""

    data: Path | None = None
    """Read this text, JSON-lines or Parquet file or folder; otherwise Wikipedia."""
    tokens: int = 16_384
    """Look at the choices for about this many held-out tokens."""
    top: int = 5
    """Show this many experts of each layer, the busiest."""
    ablate: int = 2
    """Measure what is lost without each of so many busiest experts a layer, and as many others; 0 for none."""
    json: Path | None = None
    """Write everything that was found to this file as JSON."""
    plot: Path | None = None
    """Draw loads, information and losses into this file as SVG."""
    seed: FileOnly[int] = 0
    """Draw experts and shuffle topics with this seed."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the trunk."""
