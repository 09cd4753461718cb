"""python -m tests.benchmarks.scaling --json runs/bench/scaling.json

What more experts cost: a step of one MoE layer (forward, backward, optimizer) with 65,536 experts against one with
1,024, for the same tokens, K, D and H, over two hosts and in one process, by the tokens of a step. Medians of runs that
take turns.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro

from common.allocator import keep_freed_memory
from node.model.gate import build_gate
from tests.benchmarks.contenders import Case, Metered, local, ours
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HOSTS = 2
BLOCKS = 32
EXPERTS = (1024, 65_536)
STEPS = {4096: 4, 256: 40}
"""Of a run, by the tokens of a step."""
SWARM, LOCAL = f"{HOSTS} hosts", "one process"
SECONDS, CPU = "seconds per step", "processor time, µs/token"
K = 4
NOTES = (
    f"{BLOCKS} blocks either way, product keys, K={K}, D=64, H=8; the gate is as it was made",
    "hosts and trainer have 1 thread each, and so has one process",
    "touched: experts that got a token in one step, which are those that are read, stepped and written",
)


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark(RunsConfig):
    """Cost of a step by the number of experts."""


def main(config: ScalingBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    keep_freed_memory()  # as a trainer does
    tell = Teller()
    rows = [row for tokens in STEPS for row in measure(tokens, config.runs, tell)]
    config.publish("scaling", rows, NOTES)


def cases_of(tokens: int) -> tuple[Case, Case]:
    """Few and many experts, for the same tokens."""
    few, many = (
        Case(
            key=str(experts),
            experts=experts,
            d_model=64,
            hidden=8,
            tokens=tokens,
            hosts=(HOSTS,),
            steps=STEPS[tokens],
            experts_per_token=K,
            experts_per_block=experts // BLOCKS,
            gate="product_key",
        )
        for experts in EXPERTS
    )
    return few, many


def measure(tokens: int, runs: int, tell: Teller) -> list[Row]:
    """Rows of one number of tokens."""
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        metered: dict[str, Metered] = {}
        for case in cases_of(tokens):
            with tell.busy(f"{name_of(SWARM, case)}: starting a coordinator and the hosts"):
                metered[name_of(SWARM, case)] = stack.enter_context(ours(case, HOSTS, Path(folder) / case.key))
            metered[name_of(LOCAL, case)] = local(case, 1)
        contenders: dict[str, Callable[[], float]] = {**metered}
        figures = alternate(contenders, runs, tell)
    times_us = {name: run.cpu_us[1:] for name, run in metered.items()}
    return [*rows_of(tokens, figures, times_us), touched(tokens)]


def name_of(where: str, case: Case) -> str:
    """One contender."""
    return f"{where}, {case.experts:,} experts, {case.tokens:,} tokens"


def rows_of(
    tokens: int, tokens_per_s: Mapping[str, Sequence[float]], times_us: Mapping[str, Sequence[float]]
) -> list[Row]:
    """Many against few, each where it runs."""
    rows = []
    for where in (SWARM, LOCAL):
        few, many = (name_of(where, case) for case in cases_of(tokens))
        seconds = {name: [tokens / rate for rate in tokens_per_s[name]] for name in (many, few)}
        rows.append(compare(many, SECONDS, seconds[many], few, seconds[few]))
        rows.append(compare(many, CPU, times_us[many], few, times_us[few]))
    return rows


def touched(tokens: int) -> Row:
    """How many experts a step meets."""
    few, many = (experts_met(case) for case in cases_of(tokens))
    return compare(f"{EXPERTS[1]:,} experts, {tokens:,} tokens", "touched", [many], f"{EXPERTS[0]:,} experts", [few])


def experts_met(case: Case) -> int:
    """Of a fresh gate, for tokens like those of the runs."""
    gate = build_gate(case.manifest().model, torch.Generator().manual_seed(0))
    x_TD = torch.randn(case.tokens, case.d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return len(torch.unique(gate(x_TD).expert_ids_TK))


if __name__ == "__main__":
    try:
        main(tyro.cli(ScalingBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
