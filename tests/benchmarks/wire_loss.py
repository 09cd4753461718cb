"""python -m tests.benchmarks.wire_loss --json runs/bench/wire_loss.json

What int8 on the wire costs in loss: the default model trained over two hosts, with int8 against fp32. They take turns,
with a seed for each pair; held-out bits per byte after the same tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING

import torch
import tyro

from common.allocator import keep_freed_memory
from common.folders import data_cache
from experiments.live.faulty_client import Faults
from node.data import open_dataset
from node.trainer.train_step import StepConfig
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from tests.benchmarks.report import Row, Teller, compare, document, publish
from tests.benchmarks.swarm_training import HOSTS, LOSS, Plan, train_over_hosts
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from protocol.manifest import Codec

FULL_TOKENS, FULL_SEEDS = 819_200, 3
CODECS: tuple[Codec, ...] = ("int8", "fp32")
STEPS = StepConfig(batch=8, micro_batches=2)
NOTE = f"the default manifest over {HOSTS} hosts: 2 layers x 512 experts, D=128; Wikipedia's text; 2 micro-batches of 8"


@dataclass(frozen=True, kw_only=True)
class WireLossBenchmark:
    """Loss with int8 and with fp32 on the wire."""

    json: Path
    """File for the rows."""
    seeds: int = FULL_SEEDS
    """Runs of each, of weights and data of their own; fewer than the default are for a look, not for the docs."""
    tokens: int = FULL_TOKENS
    """Of each run; the same holds for fewer of them."""


def main(config: WireLossBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    keep_freed_memory()
    tell, losses = Teller(), {codec: list[float]() for codec in CODECS}
    for seed in range(config.seeds):
        dataset = open_dataset(None, cache_dir=data_cache(), seed=seed)
        for codec, figures in losses.items():
            plan = plan_of(codec, seed, config.tokens)
            figures.append(train_over_hosts(plan, dataset, tell).bits_per_byte)
            tell(f"{plan.case}: {figures[-1]:.4f} {LOSS}")
    small = config.tokens < FULL_TOKENS or config.seeds < FULL_SEEDS
    notes = (NOTE, *((f"only {config.seeds} x {config.tokens:,} tokens: not for the docs",) if small else ()))
    publish(config.json, document("wire_loss", rows_of(losses, config.tokens), notes))


def plan_of(codec: Codec, seed: int, tokens: int) -> Plan:
    """One run."""
    return Plan(
        case=f"{codec}, seed {seed}",
        manifest=Manifest(name="bench", codec=codec, seed=seed, optimizer=OptimizerConfig(total_tokens=tokens)),
        steps=STEPS,
        n_steps=tokens // (STEPS.batch * STEPS.micro_batches * ModelConfig.context),
        faults=Faults(),
    )


def rows_of(losses: Mapping[Codec, Sequence[float]], tokens: int) -> list[Row]:
    """int8 against fp32: medians."""
    ours, theirs = (losses[codec] for codec in CODECS)
    return [compare(f"int8 on the wire, {tokens:,} tokens", LOSS, ours, "fp32 on the wire", theirs)]


if __name__ == "__main__":
    try:
        main(tyro.cli(WireLossBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
