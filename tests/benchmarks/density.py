"""python -m tests.benchmarks.density --json runs/bench/density.json

1,024 and 16,384 experts (D=128, H=64) in one host: seconds from the command to announced, and the memory of the host's
process tree (python and p2pd) at rest and after some training, against the limits of the design; memory and processes
for each expert, against hivemind's with 64. Medians over fresh starts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import tyro

from experiments.live.processes import ProcessSwarm, process_swarm, wait_until
from node.membership.config import SwarmConfig
from node.model.experts.kinds import expert_parameters
from node.trainer.dispatch.dispatcher import DispatchConfig
from node.trainer.swarm_client import SwarmClient
from tests.benchmarks.contenders import LAYER, START_TIMEOUT_S, TRAINER_THREADS, Case, LayerRun, shares
from tests.benchmarks.line_peer import LinePeer
from tests.benchmarks.meters import tree
from tests.benchmarks.report import Row, RunsConfig, Teller, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.live.processes import Node
    from node.model.moe import MoE
    from protocol.manifest import ModelConfig

FLOAT_BYTES = 4
COPIES = 3
"""Parameters and Adam's two moments."""
MEMORY_EXTRA_BYTES = 450_000_000
MB = 1e6
TIMEOUT_S = 60.0
MAX_DEAD_FRACTION = 0.02
FEW = Case(key="few", experts=1024, d_model=128, hidden=64, tokens=4096, hosts=(1,), steps=5)
MANY = replace(FEW, key="many", experts=16_384, tokens=16_384, experts_per_block=512)
PEER_EXPERTS = 64
HIVEMIND = f"hivemind, {PEER_EXPERTS} experts"
NOTES = (
    "seconds: until the directory of another process, refreshed every 2 s, has every block; host_seconds: its own word",
    "PSS and rss of the host's python and its p2pd, in MB of 1e6 bytes; PSS counts a share of what others map too",
    "limit: parameters and Adam's moments, times a factor for the rest of a host, and 450 MB",
    f"trained: after {FEW.steps} steps, of {FEW.tokens:,} and {MANY.tokens:,} tokens",
    f"hivemind 1.1.12 with {PEER_EXPERTS} experts of D=128, H=512, at rest, one start: it takes two processes for each",
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one case."""

    announced_s: float
    memory_factor: float

    def memory_bytes(self, model: ModelConfig) -> float:
        """So many times parameters and moments, and 450 MB."""
        return self.memory_factor * expert_parameters(model) * FLOAT_BYTES * COPIES + MEMORY_EXTRA_BYTES


CASES = {
    FEW: Limits(announced_s=10.0, memory_factor=1.25),
    MANY: Limits(announced_s=20.0, memory_factor=1.15),
}


@dataclass(frozen=True, kw_only=True)
class DensityBenchmark(RunsConfig):
    """Start time and memory of one host with many experts."""


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
    processes: int


@dataclass(frozen=True, kw_only=True)
class PerExpert:
    """What each of many experts takes."""

    pss_mb: float
    processes: float


def main(config: DensityBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell = Teller()
    rows, theirs = list[Row](), hivemind_per_expert(tell)
    for case, limits in CASES.items():
        starts = measure(case, config.runs, tell)
        rows += [*rows_of(case, limits, starts), *per_expert(case, starts, theirs)]
    config.publish("density", rows, NOTES)


def hivemind_per_expert(tell: Teller) -> PerExpert:
    """Of a server that is up and idle."""
    arguments = {"--experts": PEER_EXPERTS, "--d-model": FEW.d_model, "--tokens": 1, "--experts-per-token": 1}
    with (
        tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder,
        tell.busy(f"{HIVEMIND}: starting"),
    ):
        peer = LinePeer("tests.benchmarks.hivemind_peer", arguments, Path(folder) / "hivemind.log")
        try:
            peer.answer(START_TIMEOUT_S)
            return PerExpert(
                pss_mb=tree_memory(peer.pid).pss / MB / PEER_EXPERTS, processes=len(tree(peer.pid)) / PEER_EXPERTS
            )
        finally:
            peer.close()


def per_expert(case: Case, starts: Sequence[Start], theirs: PerExpert) -> list[Row]:
    """What one expert more costs a volunteer."""
    name = name_of(case)
    pss_mb = [start.trained.pss / MB / case.experts for start in starts]
    processes = [start.processes / case.experts for start in starts]
    return [
        compare(name, "PSS MB for each expert", pss_mb, HIVEMIND, [theirs.pss_mb] * len(pss_mb)),
        compare(name, "processes for each expert", processes, HIVEMIND, [theirs.processes] * len(processes)),
    ]


def name_of(case: Case) -> str:
    """As it stands in the rows."""
    return f"{case.experts:,} experts in one host, D={case.d_model}, H={case.hidden}"


def measure(case: Case, runs: int, tell: Teller) -> list[Start]:
    """So many fresh starts of a host with all of a case's experts."""
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        with tell.busy(f"{case.experts:,} experts: starting a coordinator and a client"):
            swarm = stack.enter_context(process_swarm(Path(folder), case.manifest()))
            client = stack.enter_context(SwarmClient(SwarmConfig(swarm=swarm.swarm_file), DispatchConfig()))
        layer = client.moe_layer(LAYER)
        bench = _Bench(case, swarm, client, layer, tell)
        return [bench.start(f"host-{index}") for index in range(runs)]


def rows_of(case: Case, limits: Limits, starts: Sequence[Start]) -> list[Row]:
    """Every figure against its limit: a ratio up to 1 keeps it."""
    name = name_of(case)
    limit_mb = limits.memory_bytes(case.manifest().model) / MB
    figures = {
        "announced, seconds": ([start.seconds for start in starts], limits.announced_s),
        "announced, host_seconds": ([start.host_seconds for start in starts], limits.announced_s),
        "at rest, PSS MB": ([start.rest.pss / MB for start in starts], limit_mb),
        "at rest, rss MB": ([start.rest.rss / MB for start in starts], limit_mb),
        "trained, PSS MB": ([start.trained.pss / MB for start in starts], limit_mb),
        "trained, rss MB": ([start.trained.rss / MB for start in starts], limit_mb),
    }
    return [compare(name, metric, ours, "limit", [limit] * len(ours)) for metric, (ours, limit) in figures.items()]


def tree_memory(pid: int) -> Memory:
    """Of a process and all below it."""
    root = psutil.Process(pid)
    infos = [process.memory_full_info() for process in (root, *root.children(recursive=True))]
    return Memory(pss=sum(info.pss for info in infos), rss=sum(info.rss for info in infos))


@dataclass(frozen=True)
class _Bench:
    """What the starts of one case share."""

    case: Case
    swarm: ProcessSwarm
    client: SwarmClient
    layer: MoE
    tell: Teller

    def start(self, name: str) -> Start:
        """Start a host with an empty folder, measure, end it, wait until the client no longer sees it."""
        with self.tell.busy(f"{name}: starting"):
            started = time.monotonic()
            host = self.swarm.host(name, shares(self.case.manifest().model.blocks_per_layer, hosts=1)[0])
            self.client.wait_for_all_blocks(TIMEOUT_S)
            seconds = time.monotonic() - started
            host_seconds = host.wait_for("announced")["seconds_since_start"]
            rest = tree_memory(host.child.pid)
            LayerRun(self.layer, self.case, TRAINER_THREADS)()
            self._check_trained(host)
            trained, processes = tree_memory(host.child.pid), len(tree(host.child.pid))
        told = f"{seconds:.1f} s ({host_seconds} s), PSS {rest.pss / MB:.0f} MB, then {trained.pss / MB:.0f} MB"
        self.tell(f"{name}: {told}")
        host.stop(TIMEOUT_S)  # it saves gigabytes
        wait_until(lambda: not self.client.directory.snapshot().load_by_peer(), f"{name} has vanished", TIMEOUT_S)
        return Start(seconds=seconds, host_seconds=host_seconds, rest=rest, trained=trained, processes=processes)

    def _check_trained(self, host: Node) -> None:
        dead_fraction, failed = self.layer.gate.stats().dead_fraction, self.client.dispatcher.calls_failed
        if dead_fraction > MAX_DEAD_FRACTION or failed:
            raise RuntimeError(
                f"{failed} calls failed, {dead_fraction:.1%} of the experts got no token: no figure of training; "
                f"its log ends:\n{host.child.log_tail()}"
            )


if __name__ == "__main__":
    try:
        main(tyro.cli(DensityBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
