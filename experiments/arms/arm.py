"""One model to train: what distinguishes an arm, and what it costs in parameters and FLOPs. No training here."""

# Shapes in names: D d_model, T context, H hidden width, K experts per token, E experts of a layer, V vocabulary.

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from common.assets import asset_of
from common.vocabulary import BYTE_VALUES
from experiments.arms.text import tokenizer_file
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from protocol.run_assets import DataConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from experiments.arms.text import TextName
    from protocol.manifest import BalanceRule, GateInput, GateScore

N_TABLES = 8
"""Tables of n-grams where an arm has any: by the last byte, two and so on, as the product's gate reads them."""

GateName = Literal["topk", "product_key", "hash"]
"""The product's gates. A hash whose recipe reads no codes is by tables over the last bytes, as in the first runs."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a trunk takes its tokens in and how a gate learns to choose; the manifest says what each field is.

    As it is by default, it is that of the first runs.
    """

    smear: int = 0
    gate_reads: GateInput = "hidden"
    gate_heads: int = 1
    gate_shortest: int = 2
    gate_score: GateScore = "sigmoid"
    balance: BalanceRule = "sign"
    balance_rate: float = 5e-3
    gate_lr_fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model: dense where it has no `experts`, in which case `hidden` is the width of its feed-forward layers."""

    label: str
    hidden: int
    experts: int = 0
    per_token: int = 0
    gate: GateName = "topk"
    frozen_gate: bool = False
    recipe: Recipe = Recipe()
    tables: int = 0
    """Rows of each table of n-grams at the trunk's input; see `experiments.arms.tables`."""

    vocabulary: int = 0
    """Tokens of its text's own tokenizer; 0 where each byte is one."""

    @property
    def has_table(self) -> bool:
        """Whether its gate is the table of the first runs, which reads no codes, and not one of the product's."""
        return self.gate == "hash" and self.recipe.gate_reads == "hidden"

    @property
    def active_width(self) -> int:
        """Hidden units that work for one token in one layer."""
        return self.hidden * (self.per_token if self.experts else 1)


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run. `tokens` are rounded up to whole steps; `lr` is the trunk's, `expert_lr` the experts'."""

    arm: Arm
    seed: int
    tokens: int
    lr: float
    expert_lr: float
    d_model: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 128
    batch: int = 16
    text: TextName = "summaries"
    warmup: float = 0.03
    """Part of the tokens over which the rate rises."""
    evaluations: int = 8
    eval_bytes: int = 65_536
    final_eval_bytes: int = 262_144

    @property
    def tokens_per_step(self) -> int:
        """The tokens of one optimizer step."""
        return self.batch * self.context

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def slug(self) -> str:
        """The arm's label as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.arm.label.lower().replace(",", "")).strip("-")

    def manifest(self) -> Manifest:
        """What the product's own parts are built from. A dense arm's grid is never built."""
        arm, data = self.arm, DataConfig()
        if arm.vocabulary:
            tokenizer = asset_of(tokenizer_file(self.text, arm.vocabulary))
            data = DataConfig(tokenizer=tokenizer.sha256, tokenizer_bytes=tokenizer.n_bytes)
        model = ModelConfig(
            d_model=self.d_model,
            n_layers=self.layers,
            n_heads=self.heads,
            context=self.context,
            vocab_size=arm.vocabulary or BYTE_VALUES,
            expert_hidden=arm.hidden,
            experts_per_layer=max(1, arm.experts),
            experts_per_block=max(1, arm.experts),
            experts_per_token=max(1, arm.per_token),
            gate="topk" if arm.has_table else arm.gate,
            capacity_factor=0.0,
            balance_rate=arm.recipe.balance_rate,
            smear=arm.recipe.smear,
            gate_reads=arm.recipe.gate_reads if arm.experts else "hidden",
            gate_heads=arm.recipe.gate_heads if arm.experts else 1,
            gate_shortest=arm.recipe.gate_shortest if arm.experts else 2,
            gate_score=arm.recipe.gate_score,
            balance=arm.recipe.balance,
        )
        tokens = self.steps * self.tokens_per_step
        optimizer = OptimizerConfig(
            lr=self.lr,
            expert_lr=self.expert_lr,
            warmup_tokens=int(self.warmup * tokens),
            total_tokens=tokens,
            gate_lr_fraction=arm.recipe.gate_lr_fraction,
        )
        return Manifest(name="experiment", seed=self.seed, model=model, optimizer=optimizer, data=data)

    def to_json(self) -> dict[str, Any]:
        """Return this as a trial's spec; without what is as in the first runs, whose results do not have it."""
        spec = asdict(self)
        for name in ("tables", "vocabulary"):
            if not getattr(self.arm, name):
                del spec["arm"][name]
        if self.text == "summaries":
            del spec["text"]
        if self.arm.recipe == Recipe():
            del spec["arm"]["recipe"]
        elif self.arm.recipe.gate_shortest == Recipe.gate_shortest:
            del spec["arm"]["recipe"]["gate_shortest"]
        return spec

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        arm = Arm(**{**spec["arm"], "recipe": Recipe(**spec["arm"].get("recipe", {}))})
        return cls(**{**spec, "arm": arm})


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a whole model. FLOPs are one token's forward, two per multiply-add, the gates included.

    Training takes about three times as many.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    gate_flops_per_token: int = field(default=0)


def cost(spec: TrainSpec) -> Cost:
    """Parameters and FLOPs by arithmetic."""
    arm, width = spec.arm, spec.d_model
    gate_adds, gate_parameters = gate_cost(arm, width)
    attention = 4 * width * width
    # Scores and sums over the mean of the positions that a token sees.
    attended = 2 * width * (spec.context + 1) // 2
    rows = arm.vocabulary or BYTE_VALUES
    outer = (2 * rows + arm.recipe.smear) * width
    feed_forward = 2 * width * arm.active_width
    held = 2 * width * arm.hidden * max(1, arm.experts)
    layers = spec.layers
    return Cost(
        parameters=outer + N_TABLES * arm.tables * width + layers * (attention + gate_parameters + held),
        active_parameters=outer + layers * (attention + gate_parameters + feed_forward),
        flops_per_token=2 * (outer - rows * width + layers * (attention + attended + gate_adds + feed_forward)),
        gate_flops_per_token=2 * layers * gate_adds,
    )


def gate_cost(arm: Arm, width: int) -> tuple[int, int]:
    """Multiply-adds of a token, and parameters, of one layer's gate."""
    if not arm.experts or arm.gate == "hash":
        return 0, 0
    heads = arm.recipe.gate_heads
    if arm.gate == "product_key":
        keys = math.isqrt(arm.experts) * width
        queries = heads * width * width if arm.recipe.gate_reads == "hidden" else 0
        return queries + heads * keys, queries + keys
    # The chosen logits are computed a second time, with a gradient.
    return (heads * arm.experts + arm.per_token) * width, arm.experts * width
