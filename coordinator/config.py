"""What a person can set on a coordinator, a local swarm, `status` or an experiment.

Light: no hivemind, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from common.config import EventLogConfig
from common.errors import ConfigError, ManifestError, RecordError
from common.settings import FileOnly, Preset, configured
from coordinator.credit.config import CollectionConfig
from coordinator.pretrained import parts_of, preset_around
from coordinator.snapshot_config import LocalSnapshotConfig, SnapshotConfig
from coordinator.tokens import tokens_of
from dht.swarm_config import SwarmChoice
from protocol.announcements import PeerRecord
from protocol.manifest import (
    AveragingCodec,
    AveragingConfig,
    BalanceRule,
    Codec,
    ExpertKindName,
    GateInput,
    GateKind,
    GateScore,
    Manifest,
    ModelConfig,
    OptimizerConfig,
)
from protocol.run_assets import DataConfig, PretrainedConfig, PretrainedDtype

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_HEADS, FEW_HEADS, MOST_HEADS_OF_TOKENS = 8, 4, 2
"""Heads of the gate of a new run: docs/results/choosing.md where tokens are bytes, docs/results/tokens.md elsewhere."""

OF_TOKENIZER = frozenset({"data.tokenizer", "data.tokenizer_bytes"})
NOT_COMPARED = frozenset({"name", "owner", "optimizer.total_tokens", "pretrained.attach"})
"""What flags need not say again of a run that exists; to which layers experts are attached follows from how many."""

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Preset):
    """What a new run trains. A run that exists keeps what its manifest says."""

    name: str = "local"
    """Name the run with letters, digits, - or _."""
    seed: int = 0
    """Draw the weights from this seed. A local trainer's data are drawn from it too."""
    layers: int = ModelConfig.n_layers
    """Build this many transformer layers. Each has experts of its own."""
    experts: int = ModelConfig.n_layers * ModelConfig.experts_per_layer
    """Build this many experts, counted over all layers."""
    experts_per_block: int = ModelConfig.experts_per_block
    """Host this many experts together, as a block."""
    experts_per_token: int = ModelConfig.experts_per_token
    """Send each token to this many experts in each layer."""
    expert_hidden: int = ModelConfig.expert_hidden
    """Give each expert this hidden width."""
    d_model: int = ModelConfig.d_model
    """Give the model this width."""
    heads: int = ModelConfig.n_heads
    """Give each layer this many attention heads."""
    context: int = ModelConfig.context
    """Read this many tokens of text as one sequence."""
    tokenizer: Path | None = None
    """Take tokens of this tokenizer.json, not bytes."""
    train_tokenizer: int = 0
    """Train a tokenizer of so many tokens; 0 for bytes."""
    model: str = ""
    """Put experts into this pretrained model: a folder, smollm2."""
    pretrained_dtype: FileOnly[PretrainedDtype] = "fp32"
    """Keep the pretrained model's weights in this type."""
    unfreeze: FileOnly[tuple[str, ...]] = ()
    """Train the pretrained model's parameters whose names begin so."""
    expert_kind: FileOnly[ExpertKindName] = ModelConfig.expert_kind
    """Build experts of this kind: of two layers, or a low-rank product."""
    gate: GateKind = "hash"
    """Use this gate."""
    smear: FileOnly[int] = 2
    """Add so many tokens before each to the trunk's input."""
    gate_reads: FileOnly[GateInput] = "tokens"
    """Choose experts by the layer's input (hidden), or by fixed codes of the last tokens (tokens)."""
    gate_heads: FileOnly[int] = 0
    """Let so many heads of the gate choose; 0 takes what divides a token's experts, up to 8, with a tokenizer 2."""
    gate_shortest: FileOnly[int] = 0
    """Let the first head read the code of so many tokens; 0 takes 1 with a tokenizer or more than 4 heads, else 2."""
    gate_score: FileOnly[GateScore] = "softmax"
    """Weigh the chosen experts by this function of their logits."""
    gate_lr_fraction: FileOnly[float] = 0.04
    """Train the gate at this part of the trunk's learning rate; 0 leaves it as it was drawn."""
    balance: FileOnly[BalanceRule] = "proportional"
    """Move the gate's biases by a fixed step (sign), or by how far the load is off (proportional)."""
    balance_rate: FileOnly[float] = 5e-4
    """Move a bias by at most this much in a step."""
    capacity_factor: FileOnly[float] = 0.0
    """Cap an expert's tokens at this multiple of the mean; 0 sets no limit."""
    codec: Codec = Manifest.codec
    """Send tokens and gradients in this format."""
    lr: float = 8e-3
    """Train the trunk at this peak learning rate."""
    expert_lr: FileOnly[float] = 8e-3
    """Train the experts at this peak learning rate."""
    warmup_tokens: FileOnly[int] = OptimizerConfig.warmup_tokens
    """Raise both learning rates to their peaks over this many tokens."""
    replicas: int = AveragingConfig.target_replicas
    """Aim for this many replicas of each block."""
    averaging_codec: FileOnly[AveragingCodec] = AveragingConfig.codec
    """Exchange the weights of replicas in this format."""
    averaging_period_s: FileOnly[float] = AveragingConfig.period_s
    """Have each node begin an exchange of replicas this often, in seconds."""

    def preset(self) -> Mapping[str, object]:
        """What settings that are not given are in a run around a pretrained model; empty for any other run."""
        known = {field.name for field in fields(self)}
        return {name: value for name, value in preset_around(self.model).items() if name in known} if self.model else {}

    def averaging(self) -> AveragingConfig:
        """How the run's replicas are kept in sync."""
        return AveragingConfig(
            target_replicas=self.replicas, codec=self.averaging_codec, period_s=self.averaging_period_s
        )


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig(SnapshotConfig, RunConfig, CollectionConfig, EventLogConfig):
    """Create a run, or open it again, and be its first peer."""

    name: str = "run"
    """Name the run with letters, digits, - or _."""
    out: Path = Path("runs/run")
    """Keep the run and its key in this folder."""
    manifest: Path | None = None
    """Take the run from this TOML file instead of flags."""
    data: Path | None = None
    """Train the tokenizer on this text; otherwise Wikipedia."""
    total_tokens: int = OptimizerConfig.total_tokens
    """Decay the learning rate over so many tokens."""
    listen: str = "127.0.0.1"
    """Listen on this address; auto finds one."""
    announce: str = ""
    """Have others dial this address, such as a router's."""
    dht_port: int = 0
    """Use this port for the DHT node; 0 takes last time's, at the first start a free one."""
    initial_peers: tuple[str, ...] = ()
    """Join these peers of a swarm that already runs."""
    relay_circuits: int = 64
    """Carry this many calls for peers behind a NAT. With 0 it is no relay."""
    relay_circuits_per_caller: FileOnly[int] = 16
    """Of these, carry this many for one caller."""
    relay_reservations: FileOnly[int] = 32
    """Make this many peers behind a NAT reachable through this node."""
    admission: Flag = False
    """Let nobody take part who does not have the invite."""
    invite_days: float = 0.0
    """Let the invite hold for so many days; 0 for ever."""
    invite_file: Path | None = None
    """Write the invite to this file too, for other nodes."""
    dashboard_port: FileOnly[int] = 0
    """Show the run's page at this port of this machine, from a process of its own; 0 shows none."""
    evaluators: tuple[str, ...] = ()
    """Trust these trainers' peer ids to replace experts."""
    clip_radius: FileOnly[float] = AveragingConfig.clip_radius
    """Let an exchange move weights by at most this share of their norm."""
    max_rate_scale: FileOnly[float] = AveragingConfig.max_rate_scale
    """Let trainers raise the trunk's rate by at most this factor; 1 keeps it."""
    max_staleness: FileOnly[int] = AveragingConfig.max_staleness
    """Count a gradient in full up to this many steps after its forward; 0 sets no limit."""

    def averaging(self) -> AveragingConfig:
        """Return the settings of averaging, with those that only a run that others join needs."""
        return replace(
            super().averaging(),
            clip_radius=self.clip_radius,
            max_rate_scale=self.max_rate_scale,
            max_staleness=self.max_staleness,
        )


@dataclass(frozen=True, kw_only=True)
class LocalConfig(LocalSnapshotConfig, RunConfig, EventLogConfig):
    """Train a whole swarm on this machine: a coordinator, hosts and trainers, each a process of its own."""

    hosts: int = 4
    """Start this many host processes."""
    replicas: int = 1
    """Have this many hosts hold each block, and average it."""
    trainers: int = 1
    """Start this many trainers, which share the text."""
    steps: int = 400
    """Train this many steps, counted over all trainers."""
    batch: int = 8
    """Put this many sequences into a micro-batch."""
    micro_batches: int = 2
    """Put this many micro-batches into a step."""
    out: Path | None = None
    """Write the run to this folder [runs/NAME]."""
    data: Path | None = None
    """Read this text, file or folder; otherwise Wikipedia."""
    strict: Flag = False
    """Refuse text with a bad row instead of skipping that."""
    resume: Flag = False
    """Go on with the run in --out."""
    plain: Flag = False
    """Print lines instead of the live display."""
    eval_every: int = 50
    """Evaluate on held-out text after so many steps."""
    eval_bytes: FileOnly[int] = 16_384
    """Evaluate on this many held-out bytes on the way, and on four times as many at start and end."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda:N or mps."""
    threads: int = 1
    """Give each process this many CPU threads."""

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out if self.out is not None else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class StatusConfig(SwarmChoice):
    """Show a swarm as its DHT describes it."""

    json: Flag = False
    """Print JSON, for programs."""
    listen: FileOnly[str] = "auto"
    """Listen on this address; auto takes the one that reaches the swarm."""
    timeout_s: float = 15.0
    """Wait this many seconds for the swarm."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Put one of the claims about tiny experts to the test."""

    name: tyro.conf.Positional[str] = ""
    """Run this experiment; without a name they are listed."""
    preset: Literal["quick", "full"] = "quick"
    """Choose quick to see that it runs, or full for what the pages report."""
    out: Path = Path("runs/experiments")
    """Keep what an interrupted run goes on from in this folder."""
    results: Path | None = None
    """Write page, plots and JSON to this folder. Otherwise docs/results or, for quick, the folder of --out."""
    jobs: int = 0
    """Run this many trials at once, each a process; 0 runs one for each core."""
    threads: int = 1
    """Give a trial this many CPU threads."""
    device: str = "cpu"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    only: str = ""
    """Run only trials whose names hold this text."""
    report: Flag = False
    """Run nothing and write the page from the results that there are."""


def manifest_of(config: RunConfig, *, owner: str, total_tokens: int) -> Manifest:
    """The manifest that the flags describe; raises ConfigError naming what cannot be."""
    if config.layers < 1 or config.experts < 1 or config.experts % config.layers:
        raise ConfigError(
            f"--experts {config.experts}: must be a multiple of --layers {config.layers}, the same number in each"
        )
    data, vocab_size = tokens_of(config.tokenizer) if config.tokenizer else (DataConfig(), ModelConfig.vocab_size)
    pretrained, d_model, n_heads = PretrainedConfig(), config.d_model, config.heads
    if config.model:
        pretrained, data, shape = parts_of(config)
        vocab_size, d_model, n_heads = shape.vocab_size, shape.d_model, 1
    most, shortest = gate_defaults(config)
    model = ModelConfig(
        d_model=d_model,
        n_layers=config.layers,
        n_heads=n_heads,
        context=config.context,
        vocab_size=vocab_size,
        trunk="hf" if config.model else "transformer",
        expert_kind=config.expert_kind,
        expert_hidden=config.expert_hidden,
        experts_per_layer=config.experts // config.layers,
        experts_per_block=config.experts_per_block,
        experts_per_token=config.experts_per_token,
        gate=config.gate,
        capacity_factor=config.capacity_factor,
        smear=config.smear,
        gate_reads=config.gate_reads,
        gate_heads=config.gate_heads or most,
        gate_shortest=config.gate_shortest or shortest,
        gate_score=config.gate_score,
        balance=config.balance,
        balance_rate=config.balance_rate,
    )
    optimizer = OptimizerConfig(
        lr=config.lr,
        expert_lr=config.expert_lr,
        warmup_tokens=config.warmup_tokens,
        total_tokens=total_tokens,
        gate_lr_fraction=config.gate_lr_fraction,
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
            data=data,
            pretrained=pretrained,
        )
    except ManifestError as error:
        raise ConfigError(str(error)) from None


def gate_defaults(config: RunConfig) -> tuple[int, int]:
    """How many heads choose equally many of a token's experts each, and how many tokens the first of them reads.

    What a byte says alone is worth an expert to those alone that have many; a token of a tokenizer says more, and
    longer contexts of such tokens are rare.
    """
    of_bytes = not _has_tokenizer(config)
    most = MOST_HEADS if of_bytes else MOST_HEADS_OF_TOKENS
    heads = next(n for n in range(most, 0, -1) if config.experts_per_token % n == 0)
    return heads, 2 if of_bytes and (config.gate_heads or heads) <= FEW_HEADS else 1


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
    default = _settings(manifest_of(_not_given(config), owner="", total_tokens=1))
    held = _settings(manifest)
    # A model's files tell its tokenizer; what an older version made of them stays the run's.
    ignored = NOT_COMPARED | (OF_TOKENIZER if config.model else frozenset())
    for name, value in asked.items():
        if value not in (default[name], held[name]) and name not in ignored:
            raise ConfigError(
                f"{name}: is {value}, but the run in {where} has {held[name]}, which cannot change; "
                "leave that flag out, or choose another --out"
            )


def _not_given(config: RunConfig) -> RunConfig:
    """What the run would be if no setting but its model were given, as far as that is not in the model's own files.

    Whether it has a tokenizer is kept, of which gates depend, but not which.
    """
    plain, around = type(config)(), configured(type(config), {"model": config.model})
    tokens = int(_has_tokenizer(config))
    return replace(around, model="", d_model=plain.d_model, heads=plain.heads, train_tokenizer=tokens)


def _has_tokenizer(config: RunConfig) -> bool:
    return bool(config.tokenizer or config.train_tokenizer)


def check_evaluators(peer_ids: tuple[str, ...]) -> None:
    """Raise ConfigError unless each can be the peer id of a trainer, and there are not too many."""
    try:
        PeerRecord(role="coordinator", evaluators=peer_ids)
    except RecordError as error:
        raise ConfigError(f"--{error}") from None


def _settings(manifest: Manifest) -> dict[str, object]:
    """The manifest's fields, flat: model.d_model and so on."""
    flat: dict[str, object] = {}
    for name, value in asdict(manifest).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
