"""python -m tests.benchmarks.latency --json runs/bench/latency.json

What slow and failing networks cost: a model trained over two hosts whose every call takes an exponential delay, mean 0,
10, 100, 200 and 1,000 ms, without failures and with a tenth of the calls failing. Tokens per second, and held-out loss
after the same tokens; one run of each. A step has many micro-batches, whose calls wait beside each other. `--delays-ms
0 100 --steps 3` is a quick look. `tests.benchmarks.latency_plot` draws the rows.
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
from tests.benchmarks.swarm_training import HOSTS, LOSS, Outcome, Plan, train_over_hosts
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Mapping

FULL_STEPS = 13
SPEED = "tokens/s"
NOTES = (
    f"the default manifest over {HOSTS} hosts: 2 layers x 512 experts, D=128; Wikipedia's text",
    "every call takes an exponential delay, half of it before the host has it; a failed call is told after half of it",
    "a step waits for all of its micro-batches, and each of them for four calls, one after the other",
    "a call that failed is repeated once; the first step is not in the speed; held-out loss is measured without faults",
)


@dataclass(frozen=True, kw_only=True)
class LatencyBenchmark:
    """Speed and loss under delays and failures."""

    json: Path
    """File for the rows."""
    steps: int = FULL_STEPS
    """Of each run; fewer than the default are for a look, not for the docs."""
    batch: int = 8
    """Sequences per micro-batch."""
    micro_batches: int = 160
    """Micro-batches per step."""
    delays_ms: tuple[int, ...] = (0, 10, 100, 200, 1000)
    """Means of the delays; the first is what the others are compared with."""
    fail: float = 0.1
    """Part of the calls that fail in the runs with failures."""
    fail_delays_ms: tuple[int, ...] = (100, 1000)
    """Means of the delays in these."""
    seed: int = 0
    """Of weights, data and faults."""


def main(config: LatencyBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    keep_freed_memory()
    tell = Teller()
    dataset = open_dataset(None, cache_dir=data_cache(), seed=config.seed)
    runs: dict[tuple[int, float], Outcome] = {}
    faults = [*((delay_ms, 0.0) for delay_ms in config.delays_ms)]
    faults += [(delay_ms, config.fail) for delay_ms in config.fail_delays_ms]
    for fault in faults:
        runs[fault] = train_over_hosts(plan_of(config, *fault), dataset, tell)
    publish(config.json, document("latency", rows_of(runs, config.delays_ms[0]), notes_of(config, runs)))


def plan_of(config: LatencyBenchmark, delay_ms: int, fail: float) -> Plan:
    """One run."""
    tokens = config.steps * config.batch * config.micro_batches * ModelConfig.context
    return Plan(
        case=case_of(delay_ms, fail),
        manifest=Manifest(name="bench", seed=config.seed, optimizer=OptimizerConfig(total_tokens=tokens)),
        steps=StepConfig(batch=config.batch, micro_batches=config.micro_batches, seed=config.seed),
        n_steps=config.steps,
        faults=Faults(delay_mean_s=delay_ms / 1000, fail=fail, seed=config.seed),
    )


def case_of(delay_ms: int, fail: float) -> str:
    """As it stands in the rows."""
    return f"mean delay {delay_ms} ms" + (f", {fail:.0%} of calls fail" if fail else "")


def rows_of(runs: Mapping[tuple[int, float], Outcome], first_ms: int) -> list[Row]:
    """Each run against the one with the first delay and no failures."""
    base, against = runs[first_ms, 0.0], case_of(first_ms, 0.0)
    others = [(case_of(*fault), outcome) for fault, outcome in runs.items() if fault != (first_ms, 0.0)]
    return [
        *(compare(case, SPEED, [o.tokens_per_s], against, [base.tokens_per_s]) for case, o in others),
        *(compare(case, LOSS, [o.bits_per_byte], against, [base.bits_per_byte]) for case, o in others),
    ]


def notes_of(config: LatencyBenchmark, runs: Mapping[tuple[int, float], Outcome]) -> tuple[str, ...]:
    """How the runs were made, and what else they came to."""
    step = config.batch * config.micro_batches * ModelConfig.context
    return (
        f"{step:,} tokens per step in {config.micro_batches} micro-batches, {config.steps} steps, seed {config.seed}",
        *NOTES,
        *(f"{case_of(*fault)}: {o.in_flight} in flight at the end" for fault, o in runs.items()),
        *(f"{case_of(*fault)}: {o.calls_failed:,} calls failed" for fault, o in runs.items() if fault[1]),
        *((f"only {config.steps} steps: not for the docs",) if config.steps < FULL_STEPS else ()),
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(LatencyBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
