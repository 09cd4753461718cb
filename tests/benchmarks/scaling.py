"""python -m tests.benchmarks.scaling --json runs/bench/scaling.json

What more experts cost: a step of one MoE layer (forward, backward, optimizer) with 65,536 experts against one with
1,024, for the same tokens, K, D and H, over two hosts and in one process. Medians of runs that take turns.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from node.allocator import keep_freed_memory
from tests.benchmarks.contenders import Case, Metered, local, ours
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HOSTS = 2
BLOCKS = 32
FEW_EXPERTS, MANY_EXPERTS = 1024, 65_536
FEW = Case(
    key="few",
    experts=FEW_EXPERTS,
    d_model=64,
    hidden=8,
    tokens=4096,
    hosts=(HOSTS,),
    steps=4,
    experts_per_block=FEW_EXPERTS // BLOCKS,
    gate="product_key",
)
MANY = replace(FEW, key="many", experts=MANY_EXPERTS, experts_per_block=MANY_EXPERTS // BLOCKS)
SWARM, LOCAL = f"{HOSTS} hosts", "one process"
SECONDS, CPU = "seconds per step", "processor time, µs/token"
NOTES = (
    f"{BLOCKS} blocks either way, product keys, K={FEW.experts_per_token}; the gate is as it was made",
    "hosts and trainer have 1 thread each, and so has one process",
)


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark(RunsConfig):
    """Cost of a step by the number of experts."""


def main(config: ScalingBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    keep_freed_memory()  # as a trainer does
    tell = Teller()
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        runs: dict[str, Metered] = {}
        for case in (FEW, MANY):
            with tell.busy(f"{case.experts:,} experts: starting a coordinator and {HOSTS} hosts"):
                runs[name_of(SWARM, case)] = stack.enter_context(ours(case, HOSTS, Path(folder) / case.key))
            runs[name_of(LOCAL, case)] = local(case, 1)
        contenders: dict[str, Callable[[], float]] = {**runs}
        figures = alternate(contenders, config.runs, tell)
    times_us = {name: run.cpu_us[1:] for name, run in runs.items()}
    config.publish("scaling", rows_of(figures, times_us), NOTES)


def name_of(where: str, case: Case) -> str:
    """One contender."""
    return f"{where}, {case.experts:,} experts"


def rows_of(tokens_per_s: Mapping[str, Sequence[float]], times_us: Mapping[str, Sequence[float]]) -> list[Row]:
    """Many against few, each where it runs."""
    rows = []
    for where in (SWARM, LOCAL):
        many, few = name_of(where, MANY), name_of(where, FEW)
        seconds = {name: [MANY.tokens / rate for rate in tokens_per_s[name]] for name in (many, few)}
        rows.append(compare(many, SECONDS, seconds[many], few, seconds[few]))
        rows.append(compare(many, CPU, times_us[many], few, times_us[few]))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(ScalingBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
