"""python -m tests.benchmarks.workload --json runs/bench/workload.json

hivemind's own throughput benchmark (`benchmarks/benchmark_throughput.py` in its repository) at a size for two cores:
4 experts, D=512, H=2048, two client processes that send whole batches to one expert each, forward and backward, which
steps the expert with Adam. Samples per second of a swarm's host and of hivemind's server, taking turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from experiments.live.processes import process_swarm
from protocol.manifest import Manifest, ModelConfig, OptimizerConfig
from tests.benchmarks.line_peer import LinePeer
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

EXPERTS, D_MODEL, HIDDEN, CLIENTS = 4, 512, 2048, 2
START_TIMEOUT_S, RUN_TIMEOUT_S = 120.0, 300.0
OURS, HIVEMIND, METRIC = "kilohive", "hivemind", "samples/s"
NOTES = (
    f"{EXPERTS} experts, D={D_MODEL}, H={HIDDEN}, {CLIENTS} clients with 1 thread each, fp32 on the wire",
    "one host with as many threads as there are cores; hivemind's server sets its own, with 1 handler for each expert",
    "hivemind's expert has biases, a residual and a layer norm besides, 0.2 % more parameters",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` of one call; `batches` of one client in one run."""

    rows: int
    batches: int

    @property
    def name(self) -> str:
        """As it stands in the rows."""
        return f"{self.rows:,} samples in a call"

    @property
    def samples(self) -> int:
        """Of one run."""
        return CLIENTS * self.rows * self.batches


CASES = (Case(rows=1024, batches=4), Case(rows=32, batches=16))


@dataclass(frozen=True, kw_only=True)
class WorkloadBenchmark(RunsConfig):
    """Samples per second of hivemind's own workload."""


def main(config: WorkloadBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell, rows = Teller(), list[Row]()
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
            with tell.busy(f"{case.name}: starting both"):
                contenders = {OURS: ours(case, Path(folder), stack), HIVEMIND: theirs(case, Path(folder), stack)}
            figures = alternate(contenders, config.runs, tell)
        rows.append(compare(case.name, METRIC, figures[OURS], HIVEMIND, figures[HIVEMIND]))
    config.publish("workload", rows, NOTES)


def ours(case: Case, folder: Path, stack: ExitStack) -> Callable[[], float]:
    """A coordinator, one host, two clients."""
    model = ModelConfig(
        d_model=D_MODEL,
        n_layers=1,
        expert_hidden=HIDDEN,
        experts_per_layer=EXPERTS,
        experts_per_token=1,
        experts_per_block=EXPERTS,
    )
    optimizer = OptimizerConfig(warmup_tokens=0, total_tokens=10**9)
    manifest = Manifest(name="bench", model=model, optimizer=optimizer)
    swarm = stack.enter_context(process_swarm(folder / "swarm", manifest))
    swarm.host("host", "0/0", threads=os.cpu_count() or 1)
    arguments = {"--swarm": swarm.swarm_file, "--rows": case.rows, "--batches": case.batches}
    return clients("tests.benchmarks.workload_client", arguments, (folder, stack, case))


def theirs(case: Case, folder: Path, stack: ExitStack) -> Callable[[], float]:
    """hivemind's server and two of its clients."""
    size = {"--experts": EXPERTS, "--d-model": D_MODEL, "--rows": case.rows}
    server = LinePeer("tests.benchmarks.hivemind_workload", size, folder / "hivemind.log", ("serve",))
    stack.callback(server.close)
    peer_id, addresses = server.answer(START_TIMEOUT_S).split(" ")
    arguments = {"--peer-id": peer_id, "--addresses": addresses, "--batches": case.batches, **size}
    return clients("tests.benchmarks.hivemind_workload", arguments, (folder, stack, case), ("call",))


def clients(
    module: str, arguments: Mapping[str, object], of: tuple[Path, ExitStack, Case], words: Sequence[str] = ()
) -> Callable[[], float]:
    """Start them; a function that has them run at once and tells samples per second."""
    folder, stack, case = of
    peers = []
    for seed in range(CLIENTS):
        log = folder / f"{module.rpartition('.')[2]}-{seed}.log"
        peers.append(LinePeer(module, {**arguments, "--seed": seed}, log, words))
        stack.callback(peers[-1].close)
    for peer in peers:
        peer.answer(START_TIMEOUT_S)

    def run() -> float:
        started_s = time.monotonic()
        for peer in peers:
            peer.tell("run")
        for peer in peers:
            peer.answer(RUN_TIMEOUT_S)
        return case.samples / (time.monotonic() - started_s)

    return run


if __name__ == "__main__":
    try:
        main(tyro.cli(WorkloadBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
