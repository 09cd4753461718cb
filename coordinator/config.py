"""What a person can set on a coordinator, a lighthouse, a local swarm, `status` or an experiment.

Light: no hivemind, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.errors import ConfigError, ManifestError, RecordError
from dht.swarm_config import SwarmChoice
from protocol.announcements import PeerRecord
from protocol.manifest import (
    AveragingCodec,
    AveragingConfig,
    Codec,
    GateKind,
    Manifest,
    ModelConfig,
    OptimizerConfig,
)

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a new run trains. A run that exists keeps what its manifest says."""

    name: str = "local"
    """Name of the run: letters, digits, - or _."""
    seed: int = 0
    """Seed of the weights, and of a local trainer's data."""
    layers: int = ModelConfig.n_layers
    """Transformer layers, each with its own experts."""
    experts: int = ModelConfig.n_layers * ModelConfig.experts_per_layer
    """Experts in all layers together."""
    experts_per_block: int = ModelConfig.experts_per_block
    """Experts that are hosted together."""
    experts_per_token: int = ModelConfig.experts_per_token
    """Experts that each token uses in each layer."""
    expert_hidden: int = ModelConfig.expert_hidden
    """Hidden width of an expert."""
    d_model: int = ModelConfig.d_model
    """Width of the model."""
    heads: int = ModelConfig.n_heads
    """Attention heads."""
    context: int = ModelConfig.context
    """Bytes of text in one sequence."""
    gate: GateKind = ModelConfig.gate
    """How experts are chosen."""
    capacity_factor: float = ModelConfig.capacity_factor
    """Tokens per expert over the mean; 0: no limit."""
    codec: Codec = Manifest.codec
    """On the wire."""
    lr: float = OptimizerConfig.lr
    """Peak learning rate of the trunk."""
    expert_lr: float = OptimizerConfig.expert_lr
    """Peak learning rate of the experts."""
    warmup_tokens: int = OptimizerConfig.warmup_tokens
    """Tokens until the peak rate."""
    replicas: int = AveragingConfig.target_replicas
    """Replicas of each block that hosts aim for."""
    averaging_codec: AveragingCodec = AveragingConfig.codec
    """Of what replicas exchange."""
    averaging_period_s: float = AveragingConfig.period_s
    """Seconds between the exchanges that a node begins."""

    def averaging(self) -> AveragingConfig:
        """How the run's replicas are kept in sync."""
        return AveragingConfig(
            target_replicas=self.replicas, codec=self.averaging_codec, period_s=self.averaging_period_s
        )


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig(RunConfig):
    """Create a run, or open it again, and be its first peer."""

    name: str = "run"
    """Name of the run: letters, digits, - or _."""
    out: Path = Path("runs/run")
    """Folder for manifest, swarm.toml, owner.key."""
    manifest: Path | None = None
    """TOML file that describes the run, instead of flags."""
    total_tokens: int = OptimizerConfig.total_tokens
    """Tokens over which the learning rate decays."""
    listen: str = "127.0.0.1"
    """Address to listen on; auto: this machine's."""
    announce: str = ""
    """Address that others dial, if it is another: a router's."""
    dht_port: int = 0
    """Port of the DHT node; 0: last time's, or a free one."""
    initial_peers: tuple[str, ...] = ()
    """Peers of a swarm that already runs."""
    relay_circuits: int = 64
    """Most calls carried for peers behind a NAT; 0: none."""
    admission: Flag = False
    """Let nobody take part who does not have the invite."""
    invite_days: float = 0.0
    """Days for which the invite holds; 0: for ever."""
    invite_file: Path | None = None
    """Where to write the invite too, for other nodes."""
    evaluators: tuple[str, ...] = ()
    """Peer ids of trainers whose word replaces an expert."""
    clip_radius: float = AveragingConfig.clip_radius
    """Largest move of an exchange, relative to the norm."""
    max_rate_scale: float = AveragingConfig.max_rate_scale
    """Most that trainers raise the trunk's rate; 1: not."""
    max_staleness: int = AveragingConfig.max_staleness
    """Most steps from forward to backward; 0: no limit."""
    stop_on_stdin_eof: Flag = False
    """Leave when standard input ends. For a parent process that starts this one."""

    def averaging(self) -> AveragingConfig:
        """With what only a run that others join needs to set."""
        return replace(
            super().averaging(),
            clip_radius=self.clip_radius,
            max_rate_scale=self.max_rate_scale,
            max_staleness=self.max_staleness,
        )


@dataclass(frozen=True, kw_only=True)
class LocalConfig(RunConfig):
    """Train a whole swarm on this machine: a coordinator, hosts and trainers, each a process of its own."""

    hosts: int = 4
    """Host processes."""
    replicas: int = 1
    """Hosts that hold each block, and average it."""
    trainers: int = 1
    """Trainer processes, each with its share of the text."""
    steps: int = 400
    """Optimizer steps of all trainers together."""
    batch: int = 8
    """Sequences per micro-batch."""
    micro_batches: int = 2
    """Micro-batches per step."""
    out: Path | None = None
    """Folder of the run [runs/NAME]."""
    data: Path | None = None
    """Text, JSON-lines or folder of them; else Wikipedia."""
    resume: Flag = False
    """Go on with the run in --out."""
    plain: Flag = False
    """Print lines instead of the live display."""
    eval_every: int = 50
    """Steps between held-out evaluations."""
    device: str = "auto"
    """Of hosts and trainers: auto, cpu, cuda:N or mps."""
    threads: int = 1
    """CPU threads of each process."""
    stop_on_stdin_eof: Flag = False
    """Stop when standard input ends."""

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out if self.out is not None else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class StatusConfig(SwarmChoice):
    """Show a swarm as its DHT describes it."""

    json: Flag = False
    """Print JSON, for programs."""
    listen: str = "auto"
    """Address of its DHT node; auto: it reaches the swarm."""
    timeout_s: float = 15.0
    """Seconds to wait for the swarm."""


@dataclass(frozen=True, kw_only=True)
class LighthouseConfig(SwarmChoice):
    """Be a peer that others join a run through and are reached through, and watch the run."""

    state: Path = Path("state/lighthouse")
    """Folder for key, swarm.toml, event log."""
    listen: str = "auto"
    """Address to listen on; auto: it reaches the swarm."""
    port: int = 0
    """TCP port; 0: last time's, or a free one."""
    announce: str = ""
    """Address to tell others, where it is another one."""
    max_connections: int = 512
    """Connections at a time."""
    max_reservations: int = 128
    """Peers that can be reached through this relay; 0: none."""
    max_circuits: int = 64
    """Circuits that are relayed at a time."""
    max_circuit_mb: int = 4096
    """Megabytes that one circuit may carry, both ways together."""
    max_circuit_s: float = 3600.0
    """Seconds that one circuit may last."""
    metrics_port: int = 0
    """Port for Prometheus metrics; 0 turns them off."""
    metrics_listen: str = "127.0.0.1"
    """Address for Prometheus metrics."""
    stop_on_stdin_eof: Flag = False
    """Leave when standard input ends. For a parent process that starts this one."""


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
    report: Flag = False
    """Run nothing; write the page from the results that there are."""


def manifest_of(config: RunConfig, *, owner: str, total_tokens: int) -> Manifest:
    """The manifest that the flags describe; raises ConfigError naming what cannot be."""
    if config.layers < 1 or config.experts < 1 or config.experts % config.layers:
        raise ConfigError(
            f"--experts {config.experts}: must be a multiple of --layers {config.layers}, the same number in each"
        )
    model = ModelConfig(
        d_model=config.d_model,
        n_layers=config.layers,
        n_heads=config.heads,
        context=config.context,
        expert_hidden=config.expert_hidden,
        experts_per_layer=config.experts // config.layers,
        experts_per_block=config.experts_per_block,
        experts_per_token=config.experts_per_token,
        gate=config.gate,
        capacity_factor=config.capacity_factor,
    )
    optimizer = OptimizerConfig(
        lr=config.lr, expert_lr=config.expert_lr, warmup_tokens=config.warmup_tokens, total_tokens=total_tokens
    )
    try:
        return Manifest(
            name=config.name,
            seed=config.seed,
            owner=owner,
            codec=config.codec,
            model=model,
            optimizer=optimizer,
            averaging=config.averaging(),
        )
    except ManifestError as error:
        raise ConfigError(str(error)) from None


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file that a person wrote or kept; raises ConfigError naming the file."""
    try:
        return Manifest.from_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ManifestError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def owned_by(manifest: Manifest, owner: str, where: str) -> Manifest:
    """`manifest` with `owner` filled in; raises ConfigError if it names somebody else."""
    if manifest.owner not in {"", owner}:
        raise ConfigError(
            f"{where}: belongs to {manifest.owner}, but owner.key in this folder is {owner}; "
            "put the owner's key there, or choose another --out"
        )
    return replace(manifest, owner=owner)


def check_same_run(config: RunConfig, manifest: Manifest, where: str) -> None:
    """Raise ConfigError if a flag that was given says otherwise than the run that `where` holds already."""
    asked = _settings(manifest_of(config, owner="", total_tokens=1))
    default = _settings(manifest_of(type(config)(), owner="", total_tokens=1))
    held = _settings(manifest)
    for name, value in asked.items():
        if value not in {default[name], held[name]} and name not in {"name", "owner", "optimizer.total_tokens"}:
            raise ConfigError(
                f"{name}: is {value}, but the run in {where} has {held[name]}, which cannot change; "
                "leave that flag out, or choose another --out"
            )


def check_evaluators(peer_ids: tuple[str, ...]) -> None:
    """Raise ConfigError unless each can be the peer id of a trainer, and there are not too many."""
    try:
        PeerRecord(role="coordinator", evaluators=peer_ids)
    except RecordError as error:
        raise ConfigError(f"--{error}") from None


def _settings(manifest: Manifest) -> dict[str, object]:
    """The manifest's fields, flat: model.d_model and so on."""
    table = asdict(manifest)
    parts = ("model", "optimizer", "averaging")
    flat = {f"{part}.{name}": value for part in parts for name, value in table.pop(part).items()}
    return {**table, **flat}


def program_name() -> str:
    """What a person types to get to the subcommands."""
    return "python run_node.py" if sys.argv[0].endswith("run_node.py") else "kilohive"
