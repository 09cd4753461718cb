"""python -m tests.benchmarks.latency --json runs/bench/latency.json

What slow and failing networks cost in speed: a model trained over two hosts whose every call takes an exponential
delay, mean 0, 10, 100, 200 and 1,000 ms, without failures and with a tenth of the calls failing. Tokens per second over
some steps; one run of each.
"""

from __future__ import annotations

import sys
import tempfile
import time
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
from protocol.manifest import Manifest
from tests.benchmarks.report import Row, Teller, compare, document, publish
from tests.support.faulty_client import Faults, FaultyClient
from tests.support.leaks import adopt_orphans
from tests.support.processes import process_swarm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.data import ByteDataset
    from protocol.errors import TooFewExpertsError

HOSTS = 2
BATCH, MICRO_BATCHES = 8, 2
WARM_UP_STEPS = 3
START_TIMEOUT_S, CALL_TIMEOUT_S = 120.0, 60.0
WAIT_S = 0.05
SPEED = "tokens/s"
NOTES = (
    f"the default manifest: 2 layers x 512 experts, D=128; batch {BATCH}, {MICRO_BATCHES} micro-batches in flight",
    "every call takes an exponential delay, half of it before the host has it; a failed call is told after half of it",
    "one run of each; a step waits for all of its micro-batches, and each of them for four calls, one after the other",
)


@dataclass(frozen=True, kw_only=True)
class LatencyBenchmark:
    """Speed under delays and failures."""

    json: Path
    """File for the rows."""
    steps: int = 10
    """Counted steps of each run."""
    delays_ms: tuple[int, ...] = (0, 10, 100, 200, 1000)
    """Means of the delays; the first is what the others are compared with."""
    fails: tuple[float, ...] = (0.0, 0.1)
    """Parts of the calls that fail."""
    seed: int = 0
    """Of weights, data and faults."""


@dataclass(frozen=True)
class Speed:
    """What one run came to."""

    tokens_per_s: float
    calls_failed: int


def main(config: LatencyBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    torch.set_num_threads(1)
    keep_freed_memory()
    tell = Teller()
    dataset = open_dataset(None, cache_dir=data_cache(), seed=config.seed)
    runs: dict[tuple[int, float], Speed] = {}
    for fail in config.fails:
        for delay_ms in config.delays_ms:
            with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder:
                runs[delay_ms, fail] = run(Path(folder), config, (delay_ms, fail), dataset)
            tell(f"{case_of(delay_ms, fail)}: {runs[delay_ms, fail].tokens_per_s:,.0f} tokens/s")
    failed = (f"{case_of(*fault)}: {speed.calls_failed:,} calls failed" for fault, speed in runs.items() if fault[1])
    publish(config.json, document("latency", rows_of(runs, config.delays_ms[0]), (*NOTES, *failed)))


def run(folder: Path, config: LatencyBenchmark, fault: tuple[int, float], dataset: ByteDataset) -> Speed:
    """Steps over fresh hosts that share the blocks of every layer."""
    delay_ms, fail = fault
    faults = Faults(delay_mean_s=delay_ms / 1000, fail=fail, seed=config.seed)
    manifest = Manifest(name="bench", seed=config.seed)
    with process_swarm(folder, manifest) as swarm:
        for index, blocks in enumerate(split_blocks(manifest.model, HOSTS, 1)):
            swarm.host(f"host-{index}", block_list_text(blocks))
        with SwarmClient(
            SwarmConfig(swarm=swarm.swarm_file),
            DispatchConfig(call_timeout_s=CALL_TIMEOUT_S, seed=config.seed),
            make_client=partial(FaultyClient, faults),
        ) as client:
            client.wait_for_all_blocks(START_TIMEOUT_S)
            return speed_over(client, config, dataset)


def speed_over(client: SwarmClient, config: LatencyBenchmark, dataset: ByteDataset) -> Speed:
    """Of training, without its first steps."""
    generator = torch.Generator().manual_seed(config.seed)
    layers = [client.moe_layer(layer, generator) for layer in range(client.manifest.model.n_layers)]
    model = build_trunk(client.manifest, layers, generator)
    steps = StepConfig(batch=BATCH, micro_batches=MICRO_BATCHES, seed=config.seed)

    def wait(_: TooFewExpertsError) -> None:
        client.dispatcher.wait_for_change(WAIT_S)

    training = Training(client.manifest, model, client.dispatcher, dataset, steps, wait)
    try:
        for _ in range(WARM_UP_STEPS):
            training.step()
        started_s = time.monotonic()
        for _ in range(config.steps):
            training.step()
        seconds = time.monotonic() - started_s
        return Speed(config.steps * training.tokens_per_step / seconds, client.dispatcher.calls_failed)
    finally:
        training.close()


def case_of(delay_ms: int, fail: float) -> str:
    """As it stands in the rows."""
    return f"mean delay {delay_ms} ms" + (f", {fail:.0%} of calls fail" if fail else "")


def rows_of(runs: Mapping[tuple[int, float], Speed], first_ms: int) -> list[Row]:
    """Each run against the one with the first delay and no failures."""
    base, against = runs[first_ms, 0.0], case_of(first_ms, 0.0)
    return [
        compare(case_of(*fault), SPEED, [speed.tokens_per_s], against, [base.tokens_per_s])
        for fault, speed in runs.items()
        if fault != (first_ms, 0.0)
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(LatencyBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
