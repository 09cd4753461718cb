"""What a person can set on a host or a trainer. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from protocol.swarm_choice import SwarmChoice


@dataclass(frozen=True, kw_only=True)
class SwarmConfig(SwarmChoice):
    """Which swarm to join, and how this node takes part in its DHT."""

    listen: str = "auto"
    """Address to listen on; auto: it reaches the swarm."""
    announce: str = ""
    """Address that others call, if it is another: a router's."""
    dht_port: int = 0
    """Port of the DHT node; 0 takes a free one."""
    join_timeout_s: float = 60.0
    """Seconds to wait for the swarm at the start."""
    insecure_local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Neither encrypt nor sign calls; on this machine only."""
    stop_on_stdin_eof: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave when standard input ends. For a parent process that starts this one."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a host may take of the machine that it is a guest on, and when. Shown by `host --help-limits`."""

    max_memory: str = ""
    """Memory for the node and its child process, such as 600MB. A container's own limit counts too, if it is lower."""
    max_gpu_memory: str = ""
    """Memory on the GPU, such as 4GB."""
    max_bandwidth_up: str = ""
    """Mean rate of what it sends, such as 2MB/s; at least 0.5MB/s."""
    max_bandwidth_down: str = ""
    """Mean rate of what it receives, such as 2MB/s; at least 0.5MB/s."""
    max_cpu_percent: float = 0.0
    """Mean share of one core, in percent; 400 is four cores, 0 no limit."""
    max_disk: str = ""
    """Size of the folder --state, such as 2GB."""
    schedule: str = ""
    """Hours of the day at which to work, such as 22:00-07:00, or several parted by commas; by this machine's clock."""
    only_when_idle: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Work only while nobody else needs the machine."""


@dataclass(frozen=True, kw_only=True)
class HostConfig(LimitsConfig, SwarmConfig):
    """Host blocks of experts for a run."""

    state: Path = Path("state/host")
    """Folder for key, checkpoints, event log."""
    blocks: str = "auto"
    """Blocks to host, such as 0/0-3,1/7 (layer/block); auto takes those that the swarm needs most."""
    max_blocks: int = 8
    """Most blocks to take with --blocks auto."""
    recheck_s: float = 10.0
    """Seconds between looks at which blocks to take, to move or to try again; 0: never."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """CPU threads for the experts' arithmetic."""
    port: int = 0
    """Port of the gRPC server; 0 takes a free one."""
    relay_circuits: int = 16
    """Most calls to carry at once for peers behind a NAT, if others can dial this host; 0: none."""
    metrics_port: int = 0
    """Port for Prometheus metrics; 0 turns them off."""
    max_queue_tokens: int = 65_536
    """Tokens that may wait for this host; more are refused with a retry delay."""
    keep_inputs_mb: int = 256
    """Memory for the inputs kept between a forward and its backward, in MB."""
    keep_inputs_s: float = 120.0
    """Seconds for which a forward's inputs are kept."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints."""


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
class HealthConfig:
    """Ask the node of a folder on this machine whether it serves."""

    state: Path = Path("state/host")
    """The node's folder: a host's --state, a trainer's or a coordinator's --out."""
    timeout_s: float = 3.0
    """Seconds to wait for its answer."""
    insecure_local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The node was started with --insecure-local."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Tell the host of a folder on this machine what its owner wants."""

    state: Path = Path("state/host")
    """The host's folder."""
    timeout_s: float = 60.0
    """Seconds to wait until it has done so."""


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


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Put one of the claims about tiny experts to the test."""

    name: tyro.conf.Positional[str] = ""
    """Which one; without a name they are listed."""
    preset: Literal["quick", "full"] = "quick"
    """Quick shows that it runs, full is what the pages report."""
    out: Path = Path("runs/experiments")
    """Folder for what an interrupted run goes on from."""
    results: Path | None = None
    """Folder for page, plots and JSON; else docs/results, or for quick the folder of --out."""
    jobs: int = 0
    """Trials at once, each a process; 0: one for each core."""
    threads: int = 1
    """CPU threads of a trial."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:N or mps."""
    only: str = ""
    """Run only trials whose names hold this text."""
    report: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run nothing; write the page from the results that there are."""
