"""The manifest: what one run trains, as every node of it must agree. TOML, signed by the run's owner.

A run id ends in a hash of the manifest's canonical TOML, so a run id names exactly one manifest and nobody,
the owner included, can swap it under a running swarm.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

import tomli_w

from common.errors import ManifestError
from common.vocabulary import BYTE_VALUES, MAX_VOCABULARY
from protocol import limits
from protocol.run_assets import DataConfig, PretrainedConfig, check_data, check_pretrained
from protocol.version import HOW_TO_UPDATE, PROTOCOL_VERSION, VERSION, is_older, is_version

if TYPE_CHECKING:
    from common.assets import Asset

MAX_TOML_BYTES = 8192
MAX_NAME_CHARS = 48
MAX_INTEGER = 1 << 63
HASH_CHARS = 32
"""128 bits: building a second manifest with the same run id stays out of reach."""

MAX_SMEAR = 16
MAX_GATE_HEADS = 16
MAX_GATE_SHORTEST = 16

T = TypeVar("T")

_BLOCK = re.compile(r"(0|[1-9][0-9]{0,4})/(0|[1-9][0-9]{0,8})")

Codec = Literal["fp64", "fp32", "bf16", "fp16", "int8"]
Dtype = Literal["fp32", "fp64"]
TrunkKind = Literal["transformer", "hf"]
GateKind = Literal["topk", "product_key", "hash"]
GateInput = Literal["hidden", "tokens"]
GateScore = Literal["sigmoid", "softmax"]
BalanceRule = Literal["sign", "proportional"]
ExpertKindName = Literal["ffn", "lora"]
AveragingCodec = Literal["fp32", "bf16", "int8"]
StaleAction = Literal["scale", "refuse"]


class BlockId(NamedTuple):
    """A contiguous range of experts of one layer: the unit of hosting. `TRUNK` is the one that trainers hold."""

    layer: int
    block: int

    def __str__(self) -> str:
        return TRUNK_NAME if self.layer < 0 else f"{self.layer}/{self.block}"


TRUNK_NAME = "trunk"
TRUNK = BlockId(-1, 0)
"""The dense part of the model as a block: its replicas live on trainers, and it is averaged like any other."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model, trunk and grid of experts, and how the gate chooses among them.

    `trunk` is a transformer of our own, or with hf a pretrained model that `PretrainedConfig` names.
    `smear` tokens before each are added to the trunk's input, each times a vector that is learnt. `gate_reads` says
    what the gate chooses by: the layer's input, or fixed codes of the tokens. Each of its `gate_heads` chooses an equal
    part of a token's experts; the first reads the code of the last `gate_shortest` tokens, the next that of one more.
    `gate_score` says what becomes of its logits, and `balance` how its biases follow the load, by at most
    `balance_rate` in a step; see `node/model/gate/base.py`.
    """

    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    context: int = 128
    vocab_size: int = BYTE_VALUES
    trunk: TrunkKind = "transformer"
    expert_kind: ExpertKindName = "ffn"
    expert_hidden: int = 32
    experts_per_layer: int = 512
    experts_per_block: int = 32
    experts_per_token: int = 4
    gate: GateKind = "topk"
    capacity_factor: float = 16.0
    balance_rate: float = 5e-3
    smear: int = 0
    gate_reads: GateInput = "hidden"
    gate_heads: int = 1
    gate_shortest: int = 2
    gate_score: GateScore = "sigmoid"
    balance: BalanceRule = "sign"

    @property
    def blocks_per_layer(self) -> int:
        """Number of blocks in each layer; the last one may be smaller."""
        return -(-self.experts_per_layer // self.experts_per_block)

    def block_experts(self, block: int) -> range:
        """Expert indices of `block`, within its layer."""
        start = block * self.experts_per_block
        return range(start, min(start + self.experts_per_block, self.experts_per_layer))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam for trunk and experts, with one schedule over the run's tokens.

    `gate_lr_fraction`: the gate's learning rate as a part of the trunk's; with 0 the gate stays as it was drawn.
    """

    lr: float = 5e-3
    expert_lr: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    expert_grad_clip: float = 1.0
    warmup_tokens: int = 50_000
    total_tokens: int = 1_000_000
    final_lr_fraction: float = 0.1
    gate_lr_fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """How replicas are kept in sync, and how old a gradient may be.

    `period_s` seconds between the exchanges that a node begins; `clip_radius` how far one exchange may move an expert
    (or the trunk), relative to the L2 norm of its weights; `max_rate_scale` bounds the factor of a trunk's learning
    rate that grows with the trainers it is averaged with (1: no factor); `max_staleness` optimizer steps between a
    gradient's forward and its backward (0: no limit), beyond which the step is scaled down or refused.
    """

    target_replicas: int = 2
    period_s: float = 1.0
    codec: AveragingCodec = "fp32"
    clip_radius: float = 0.5
    max_rate_scale: float = 4.0
    max_staleness: int = 64
    stale_action: StaleAction = "scale"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that defines a run. `owner` is the peer id of the key that signs it.

    `minimum_version`: the oldest kilohive that may join, such as 0.2.1; empty for any.
    """

    name: str
    seed: int = 0
    owner: str = ""
    protocol_version: int = PROTOCOL_VERSION
    minimum_version: str = ""
    codec: Codec = "int8"
    dtype: Dtype = "fp32"
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)

    def __post_init__(self) -> None:
        _check_manifest(self)

    @cached_property
    def run_id(self) -> str:
        """Name and hash: the same manifest has the same id everywhere. Every request carries it, so it is kept."""
        return f"{self.name}-{hashlib.sha256(self.to_toml().encode()).hexdigest()[:HASH_CHARS]}"

    @property
    def assets(self) -> tuple[Asset, ...]:
        """The files that trainers need."""
        tokenizer = self.data.tokenizer_asset
        return (*((tokenizer,) if tokenizer else ()), *(file.asset for file in self.pretrained.files))

    def to_toml(self) -> str:
        """Canonical text: fields in the order of the dataclasses, without younger ones that are at their defaults."""
        table = asdict(self)
        for part, names in _LATER.items():
            for name in names:
                if table[part][name] == getattr(_DEFAULTS[part], name):
                    del table[part][name]
            if not table[part]:
                del table[part]
        return tomli_w.dumps(table)

    @classmethod
    def from_toml(cls, text: str) -> Manifest:
        """Parse and check every field; raises ManifestError naming the first that is wrong."""
        if len(text.encode()) > MAX_TOML_BYTES:
            raise ManifestError(f"manifest: longer than {MAX_TOML_BYTES} bytes")
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            # tomllib's own error is a ValueError; so is an integer of thousands of digits.
            raise ManifestError(f"manifest: not TOML: {str(error)[:200]}") from None
        # First of all, as the fields of another version may be unknown here.
        _check_versions(table.get("protocol_version", PROTOCOL_VERSION), table.get("minimum_version", ""))
        model = _build(ModelConfig, table.pop("model", {}), "model.")
        optimizer = _build(OptimizerConfig, table.pop("optimizer", {}), "optimizer.")
        averaging = _build(AveragingConfig, table.pop("averaging", {}), "averaging.")
        data = _build(DataConfig, table.pop("data", {}), "data.")
        pretrained = _build(PretrainedConfig, table.pop("pretrained", {}), "pretrained.")
        parts = {"model": model, "optimizer": optimizer, "averaging": averaging, "data": data}
        return _build(cls, {**table, **parts, "pretrained": pretrained}, "")


_LATER = {
    "model": ("trunk", "smear", "gate_reads", "gate_heads", "gate_shortest", "gate_score", "balance"),
    "optimizer": ("gate_lr_fraction",),
    "data": ("tokenizer", "tokenizer_bytes"),
    "pretrained": ("files", "dtype", "attach", "unfreeze"),
}
"""Fields that are younger than the first runs, whose manifests, and so their ids, must stay as they were."""

_DEFAULTS = {"model": ModelConfig, "optimizer": OptimizerConfig, "data": DataConfig, "pretrained": PretrainedConfig}


def parse_block_id(text: str) -> BlockId:
    """The block that `str` of a block id names; ValueError for anything else. Its place in the grid is not checked."""
    if text == TRUNK_NAME:
        return TRUNK
    match = _BLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not LAYER/BLOCK or {TRUNK_NAME}")
    return BlockId(int(match[1]), int(match[2]))


def all_blocks(model: ModelConfig) -> list[BlockId]:
    """Every block of the grid, in order of layer and index."""
    return [BlockId(layer, block) for layer in range(model.n_layers) for block in range(model.blocks_per_layer)]


def _build(cls: type[T], table: object, prefix: str) -> T:
    """Build a config from an untrusted table: every key known, every value of its declared type."""
    if not isinstance(table, dict):
        raise ManifestError(f"{prefix.rstrip('.') or 'manifest'}: must be a table")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise ManifestError(f"{prefix}{key}: unknown field; this run may need a newer kilohive")
        values[key] = _typed(f"{prefix}{key}", value, hints[key])
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ManifestError(f"{prefix}{missing[0]}: missing")
    return cls(**values)


def _typed(name: str, value: object, hint: Any) -> object:  # noqa: ANN401 - a type, or a Literal
    if get_origin(hint) is tuple:
        return _typed_items(name, value, get_args(hint)[0])
    choices = get_args(hint)
    if choices:
        if value not in choices:
            raise ManifestError(f"{name}: is {str(value)[:60]!r}, must be one of {', '.join(map(str, choices))}")
        return value
    if hint is float and type(value) is int and abs(value) <= MAX_INTEGER:
        return float(value)
    if type(value) is not hint or (type(value) is int and abs(value) > MAX_INTEGER):
        raise ManifestError(f"{name}: must be {hint.__name__}, is {type(value).__name__} {str(value)[:60]}")
    return value


def _typed_items(name: str, values: object, hint: Any) -> tuple[object, ...]:  # noqa: ANN401 - see _typed
    if not isinstance(values, list):
        raise ManifestError(f"{name}: must be a list")
    if is_dataclass(hint):
        return tuple(_build(cast("type[object]", hint), value, f"{name}.") for value in values)
    return tuple(_typed(name, value, hint) for value in values)


def _check_manifest(manifest: Manifest) -> None:
    name = manifest.name
    if (
        not name
        or len(name) > MAX_NAME_CHARS
        or not name.replace("-", "").replace("_", "").isalnum()
        or not name.isascii()
    ):
        raise ManifestError(f"name: must be 1 to {MAX_NAME_CHARS} letters, digits, - or _, is {name[:60]!r}")
    _check_versions(manifest.protocol_version, manifest.minimum_version)
    if not 0 <= manifest.seed < 1 << 53:
        raise ManifestError(f"seed: must be from 0 to 2**53 - 1, is {manifest.seed}")
    _check_ranges(manifest.model, _MODEL_RANGES, "model.")
    _check_ranges(manifest.optimizer, _OPTIMIZER_RANGES, "optimizer.")
    _check_ranges(manifest.averaging, _AVERAGING_RANGES, "averaging.")
    _check_model(manifest.model)
    check_data(manifest.data, manifest.model.vocab_size)
    model = manifest.model
    check_pretrained(manifest.pretrained, model.trunk, model.gate, model.n_layers)


def _check_versions(protocol_version: object, minimum_version: object) -> None:
    if protocol_version != PROTOCOL_VERSION:
        raise ManifestError(
            f"protocol_version: this run speaks {str(protocol_version)[:20]}, this kilohive speaks "
            f"{PROTOCOL_VERSION}; {HOW_TO_UPDATE}"
        )
    if not isinstance(minimum_version, str) or (minimum_version and not is_version(minimum_version)):
        raise ManifestError(f"minimum_version: must be a version such as 0.2.1, is {str(minimum_version)[:40]!r}")
    if minimum_version and is_older(VERSION, minimum_version):
        raise ManifestError(
            f"minimum_version: this run needs kilohive {minimum_version} or newer, this is {VERSION}; {HOW_TO_UPDATE}"
        )


_MODEL_RANGES: dict[str, tuple[float, float]] = {
    "d_model": (1, limits.MAX_WIDTH),
    "n_layers": (1, limits.MAX_LAYERS),
    "n_heads": (1, 1024),
    "context": (1, limits.MAX_TOKENS),
    "vocab_size": (2, MAX_VOCABULARY),
    "expert_hidden": (1, limits.MAX_WIDTH),
    "experts_per_layer": (1, limits.MAX_EXPERTS_PER_LAYER),
    "experts_per_block": (1, limits.MAX_EXPERTS_PER_LAYER),
    "experts_per_token": (1, limits.MAX_EXPERTS_PER_TOKEN),
    "capacity_factor": (0, 1e6),
    "balance_rate": (0, 1),
    "smear": (0, MAX_SMEAR),
    "gate_heads": (1, MAX_GATE_HEADS),
    "gate_shortest": (1, MAX_GATE_SHORTEST),
}

_OPTIMIZER_RANGES: dict[str, tuple[float, float]] = {
    "lr": (0, 10),
    "expert_lr": (0, 10),
    "beta1": (0, 0.9999),
    "beta2": (0, 0.99999),
    "eps": (1e-30, 1),
    "weight_decay": (0, 10),
    "grad_clip": (1e-9, 1e9),
    "expert_grad_clip": (1e-9, 1e9),
    "warmup_tokens": (0, limits.MAX_RUN_TOKENS),
    "total_tokens": (1, limits.MAX_RUN_TOKENS),
    "final_lr_fraction": (0, 1),
    "gate_lr_fraction": (0, 1000),
}

_AVERAGING_RANGES: dict[str, tuple[float, float]] = {
    "target_replicas": (1, 64),
    "period_s": (0.05, 86_400),
    "clip_radius": (1e-6, 10),
    "max_rate_scale": (1, 64),
    "max_staleness": (0, limits.MAX_RUN_TOKENS),
}


def _check_ranges(config: object, ranges: dict[str, tuple[float, float]], prefix: str) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not math.isfinite(value) or not low <= value <= high:
            raise ManifestError(f"{prefix}{name}: must be from {low} to {high}, is {value}")


def _check_model(model: ModelConfig) -> None:
    if model.d_model % (2 * model.n_heads):
        raise ManifestError(
            f"model.d_model: must be a multiple of 2 * n_heads = {2 * model.n_heads}, is {model.d_model}"
        )
    if model.experts_per_token > model.experts_per_layer:
        raise ManifestError(
            f"model.experts_per_token: is {model.experts_per_token}, "
            f"more than the {model.experts_per_layer} experts per layer"
        )
    if model.experts_per_token % model.gate_heads:
        raise ManifestError(
            f"model.gate_heads: must divide experts_per_token = {model.experts_per_token}, is {model.gate_heads}"
        )
    if model.gate == "hash" and model.gate_reads != "tokens":
        raise ManifestError(
            f"model.gate_reads: must be tokens where gate is hash, is {model.gate_reads!r}; or take "
            "another gate, such as topk"
        )
    if model.gate == "product_key" and math.isqrt(model.experts_per_layer) ** 2 != model.experts_per_layer:
        raise ManifestError(
            f"model.experts_per_layer: product keys need a square number such as 256, 1024 or 4096, "
            f"is {model.experts_per_layer}"
        )
