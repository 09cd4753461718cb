"""python -m tests.benchmarks.density --json runs/bench/density.json

1,024 experts (D=128, H=64) in one host: seconds from the command to announced, and the memory of the host's process
tree (python and p2pd) at rest and after some training, against the limits of the design. Medians over fresh starts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import tyro

from node.config import SwarmConfig
from node.dispatch.dispatcher import DispatchConfig
from node.experts.kinds import expert_parameters
from node.swarm import SwarmClient
from tests.benchmarks.contenders import LAYER, TRAINER_THREADS, Case, LayerRun, shares
from tests.benchmarks.report import Row, Teller, compare, document, publish
from tests.support.leaks import adopt_orphans
from tests.support.processes import ProcessSwarm, process_swarm, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.moe import MoE
    from protocol.manifest import ModelConfig
    from tests.support.processes import Node

MIN_RUNS = 5
FLOAT_BYTES = 4
COPIES = 3
"""Parameters and Adam's two moments."""
ANNOUNCED_LIMIT_S = 10.0
MEMORY_FACTOR = 1.25
MEMORY_EXTRA_BYTES = 450_000_000
MB = 1e6
TIMEOUT_S = 60.0
CASE = Case(key="density", experts=1024, d_model=128, hidden=64, tokens=4096, hosts=(1,), steps=5)
NOTES = (
    "seconds: until the directory of another process, refreshed every 2 s, has every block; host_seconds: its own word",
    "PSS and rss of the host's python and its p2pd, in MB of 1e6 bytes; PSS counts a share of what others map too",
    f"trained: after {CASE.steps} steps of {CASE.tokens} tokens in which every expert took part",
)


@dataclass(frozen=True, kw_only=True)
class DensityBenchmark:
    """Start time and memory of one host with 1,024 experts."""

    json: Path
    """File for the rows."""
    runs: int = MIN_RUNS
    """Fresh starts; fewer than 5 are for a look, not for the docs."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a process tree, in bytes."""

    pss: int
    rss: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start of a host measured."""

    seconds: float
    host_seconds: float
    rest: Memory
    trained: Memory


def main(config: DensityBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell = Teller()
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        with tell.busy("starting a coordinator and a client"):
            swarm = stack.enter_context(process_swarm(Path(folder), CASE.manifest()))
            client = stack.enter_context(SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig()))
        layer = client.moe_layer(LAYER)
        starts = [_start(f"host-{index}", swarm, client, layer, tell) for index in range(config.runs)]
    notes = NOTES if config.runs >= MIN_RUNS else (*NOTES, f"only {config.runs} runs: not for the docs")
    publish(config.json, document("density", rows_of(starts), notes))


def memory_limit_bytes(model: ModelConfig) -> float:
    """1.25 times parameters and moments, and 450 MB."""
    return MEMORY_FACTOR * expert_parameters(model) * FLOAT_BYTES * COPIES + MEMORY_EXTRA_BYTES


def rows_of(starts: Sequence[Start]) -> list[Row]:
    """Every figure against its limit: a ratio up to 1 keeps it."""
    case = f"{CASE.experts} experts in one host, D={CASE.d_model}, H={CASE.hidden}"
    limit_mb = memory_limit_bytes(CASE.manifest().model) / MB
    figures = {
        "announced, seconds": ([start.seconds for start in starts], ANNOUNCED_LIMIT_S),
        "announced, host_seconds": ([start.host_seconds for start in starts], ANNOUNCED_LIMIT_S),
        "at rest, PSS MB": ([start.rest.pss / MB for start in starts], limit_mb),
        "at rest, rss MB": ([start.rest.rss / MB for start in starts], limit_mb),
        "trained, PSS MB": ([start.trained.pss / MB for start in starts], limit_mb),
        "trained, rss MB": ([start.trained.rss / MB for start in starts], limit_mb),
    }
    return [compare(case, metric, ours, "limit", [limit] * len(ours)) for metric, (ours, limit) in figures.items()]


def tree_memory(pid: int) -> Memory:
    """Of a process and all below it."""
    root = psutil.Process(pid)
    infos = [process.memory_full_info() for process in (root, *root.children(recursive=True))]
    return Memory(pss=sum(info.pss for info in infos), rss=sum(info.rss for info in infos))


def _start(name: str, swarm: ProcessSwarm, client: SwarmClient, layer: MoE, tell: Teller) -> Start:
    """Start a host with an empty folder, measure, end it, wait until the client no longer sees it."""
    with tell.busy(f"{name}: starting"):
        started = time.monotonic()
        host = swarm.host(name, shares(CASE.manifest().model.blocks_per_layer, hosts=1)[0])
        client.wait_for_all_blocks(TIMEOUT_S)
        seconds = time.monotonic() - started
        host_seconds = host.wait_for("announced")["seconds_since_start"]
        rest = tree_memory(host.child.pid)
        LayerRun(layer, CASE, TRAINER_THREADS)()
        _check_trained(layer, client, host)
        trained = tree_memory(host.child.pid)
    tell(f"{name}: {seconds:.1f} s ({host_seconds} s), PSS {rest.pss / MB:.0f} MB, then {trained.pss / MB:.0f} MB")
    host.stop()
    wait_until(lambda: not client.directory.snapshot().load_by_peer(), f"{name} has vanished", TIMEOUT_S)
    return Start(seconds=seconds, host_seconds=host_seconds, rest=rest, trained=trained)


def _check_trained(layer: MoE, client: SwarmClient, host: Node) -> None:
    dead_fraction, failed = layer.gate.stats().dead_fraction, client.dispatcher.calls_failed
    if dead_fraction or failed:
        raise RuntimeError(
            f"{failed} calls failed, {dead_fraction:.1%} of the experts got no token: no figure for a trained host. "
            f"Its log ends:\n{host.child.log_tail()}"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(DensityBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
