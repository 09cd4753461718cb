"""python -m tests.benchmarks.latency --json runs/bench/latency.json

What slow and failing networks cost: a model trained over two hosts whose every call takes an exponential delay, mean 0,
10, 100, 200 and 1,000 ms, without failures and with a tenth of the calls failing. Tokens per second, and held-out loss
after the same tokens; one run of each. A step has many micro-batches, whose calls wait beside each other. `--delays-ms
0 100 --steps 3` is a quick look. `tests.benchmarks.latency_plot` draws the rows.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro

from coordinator.blocks import block_list_text, split_blocks
from node.allocator import keep_freed_memory
from node.config import SwarmConfig
from node.data import open_dataset
from node.dispatch.dispatcher import DispatchConfig
from node.folders import data_cache
from node.swarm import SwarmClient
from node.training import StepConfig, Training, build_trunk
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from tests.benchmarks.report import Row, Teller, compare, document, publish
from tests.support.faulty_client import Faults, FaultyClient
from tests.support.leaks import adopt_orphans
from tests.support.processes import process_swarm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.data import ByteDataset
    from protocol.errors import TooFewExpertsError

HOSTS = 2
FULL_STEPS = 16
START_TIMEOUT_S, CALL_TIMEOUT_S = 120.0, 60.0
WAIT_S = 0.05
HELD_OUT_BYTES = 65_536
SPEED, LOSS = "tokens/s", "held-out bits per byte"
NOTES = (
    "the default manifest: 2 layers x 512 experts, D=128; Wikipedia's text; the held-out loss is measured without faults",
    "every call takes an exponential delay, half of it before the host has it; a failed call is told after half of it",
    "a step waits for all of its micro-batches, each of them for four calls, one after the other; first step not in speed",
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
    micro_batches: int = 128
    """Micro-batches per step."""
    delays_ms: tuple[int, ...] = (0, 10, 100, 200, 1000)
    """Means of the delays; the first is what the others are compared with."""
    fail: float = 0.1
    """Part of the calls that fail in the runs with failures."""
    fail_delays_ms: tuple[int, ...] = (100, 1000)
    """Means of the delays in these."""
    seed: int = 0
    """Of weights, data and faults."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to; `in_flight` micro-batches in its last step."""

    tokens_per_s: float
    bits_per_byte: float
    calls_failed: int
    in_flight: int


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
        with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder:
            runs[fault] = run(Path(folder), config, fault, (dataset, tell))
    publish(config.json, document("latency", rows_of(runs, config.delays_ms[0]), notes_of(config, runs)))


def run(folder: Path, config: LatencyBenchmark, fault: tuple[int, float], of: tuple[ByteDataset, Teller]) -> Outcome:
    """Steps over fresh hosts that share the blocks of every layer."""
    delay_ms, fail = fault
    faults = Faults(delay_mean_s=delay_ms / 1000, fail=fail, seed=config.seed)
    tokens = config.steps * config.batch * config.micro_batches * ModelConfig.context
    manifest = Manifest(name="bench", seed=config.seed, optimizer=OptimizerConfig(total_tokens=tokens))
    with process_swarm(folder, manifest) as swarm:
        for index, blocks in enumerate(split_blocks(manifest.model, HOSTS, 1)):
            swarm.host(f"host-{index}", block_list_text(blocks))
        with SwarmClient(
            SwarmConfig(swarm=swarm.swarm_file),
            DispatchConfig(call_timeout_s=CALL_TIMEOUT_S, seed=config.seed),
            make_client=partial(FaultyClient, faults),
        ) as client:
            client.wait_for_all_blocks(START_TIMEOUT_S)
            return outcome_of(client, config, case_of(*fault), of)


def outcome_of(client: SwarmClient, config: LatencyBenchmark, case: str, of: tuple[ByteDataset, Teller]) -> Outcome:
    """Of training; its first step is not counted in the speed."""
    dataset, tell = of
    generator = torch.Generator().manual_seed(config.seed)
    layers = [client.moe_layer(layer, generator) for layer in range(client.manifest.model.n_layers)]
    model = build_trunk(client.manifest, layers, generator)
    steps = StepConfig(batch=config.batch, micro_batches=config.micro_batches, seed=config.seed)

    def wait(_: TooFewExpertsError) -> None:
        client.dispatcher.wait_for_change(WAIT_S)

    training = Training(client.manifest, model, client.dispatcher, dataset, steps, wait)
    try:
        results = []
        for step in range(1, config.steps + 1):
            results.append(training.step())
            speed = training.tokens_per_step / results[-1].seconds
            tell(f"{case}: step {step} of {config.steps}, {speed:,.0f} tokens/s, {results[-1].loss:.3f} nats per byte")
        failed = client.dispatcher.calls_failed
        if isinstance(client.client, FaultyClient):
            client.client.faults = Faults()
        client.wait_for_all_blocks(START_TIMEOUT_S)
        counted = results[1:] or results
        return Outcome(
            tokens_per_s=len(counted) * training.tokens_per_step / sum(result.seconds for result in counted),
            bits_per_byte=training.evaluate(HELD_OUT_BYTES),
            calls_failed=failed,
            in_flight=results[-1].in_flight,
        )
    finally:
        training.close()


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
