"""python -m tests.benchmarks.dispatch --json runs/bench/dispatch.json

Forward, backward and step of one MoE layer in tokens per second: RemoteMoE over host processes, against LocalMoE in
one process and against hivemind's RemoteMixtureOfExperts. They take turns, one warm-up each first;
figures are medians. `--cases small --peer none --runs 1` is a quick look.

All three differentiate towards the tokens and the gate and step the experts with Adam inside the backward; nobody steps
the gate's own parameters. hivemind's expert has biases, a residual and a layer norm besides, 1.4 % more parameters.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from common.allocator import keep_freed_memory
from tests.benchmarks.contenders import TRAINER_THREADS, Case, local, one_step_of_theirs, ours, theirs
from tests.benchmarks.report import Row, RunsConfig, Teller, alternate, compare, not_compared
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

METRIC, CPU = "tokens/s", "processor time, µs/token"
OURS, LOCAL, LOCAL_1, HIVEMIND = "RemoteMoE", "LocalMoE, every core", "LocalMoE, 1 thread", "hivemind"
CASES = (
    Case(key="small", experts=64, d_model=64, hidden=256, tokens=256, hosts=(1, 2), steps=40),
    Case(key="wide", experts=64, d_model=64, hidden=256, tokens=4096, hosts=(2,), steps=10, peer_limit_s=300),
    Case(key="medium", experts=256, d_model=64, hidden=256, tokens=4096, hosts=(2,), steps=12),
    Case(key="large", experts=1024, d_model=128, hidden=128, tokens=4096, hosts=(2,), steps=10),
    Case(key="large-int8", experts=1024, d_model=128, hidden=128, tokens=4096, hosts=(2,), steps=10, codec="int8"),
)
HIVEMIND_NOT_RUN = "hivemind 1.1.12 not run: it takes two processes per expert"
NOTES = (
    f"hosts have 1 thread each, RemoteMoE's trainer {TRAINER_THREADS}, hivemind what it sets itself",
    "figures are medians of alternating runs after one warm-up each; ratio = ours / theirs",
    "processor time: of the trainer's process and the hosts with their p2pd, all threads, user and system",
    "hivemind's client DHT pipe is made blocking again, without which it dies at 64 experts too on a busy machine",
)


@dataclass(frozen=True, kw_only=True)
class DispatchBenchmark(RunsConfig):
    """Tokens per second of one MoE layer: our swarm, one process, hivemind."""

    cases: str = ",".join(case.key for case in CASES)
    """Which sizes, parted by commas."""
    peer: Literal["hivemind", "none"] = "hivemind"
    """Whom to compare with besides LocalMoE, where it can run the size."""


def main(config: DispatchBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    keep_freed_memory()  # as a trainer does
    tell = Teller()
    rows: list[Row] = []
    for case in chosen_cases(config.cases):
        for hosts in case.hosts:
            rows += measure(case, hosts, config, tell)
    config.publish("dispatch", rows, NOTES)


def chosen_cases(keys: str) -> list[Case]:
    """By key; SystemExit naming the known ones for any other."""
    known = {case.key: case for case in CASES}
    unknown = [key for key in keys.split(",") if key not in known]
    if unknown:
        raise SystemExit(f"--cases: {', '.join(unknown)!r} is not known; known: {', '.join(known)}")
    return [known[key] for key in keys.split(",")]


def measure(case: Case, hosts: int, config: DispatchBenchmark, tell: Teller) -> list[Row]:
    """Rows of one case: against LocalMoE, and against hivemind if it is compared."""
    name = case.name(hosts)
    with_hivemind = config.peer == "hivemind" and hivemind_can(case) and case.peer_limit_s is None
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        with tell.busy(f"{name}: starting a coordinator and {hosts} host processes"):
            run = stack.enter_context(ours(case, hosts, Path(folder) / "swarm"))
        # With a thread per core LocalMoE is faster on a quiet machine, much slower on a busy one: both are shown.
        metered = {OURS: run, LOCAL: local(case, os.cpu_count() or 1), LOCAL_1: local(case, 1)}
        contenders: dict[str, Callable[[], float]] = {**metered}
        if with_hivemind:
            with tell.busy(f"{name}: starting hivemind, {case.experts} experts"):
                contenders[HIVEMIND] = stack.enter_context(theirs(case, Path(folder) / "hivemind.log"))
        with tell.busy(f"{name}: measuring"):
            figures = alternate(contenders, config.runs, tell)
    times_us = {who: run.cpu_us[1:] for who, run in metered.items()}
    rows = rows_of(case, name, figures)
    rows += [compare(name, CPU, times_us[OURS], other, times_us[other]) for other in (LOCAL, LOCAL_1)]
    if config.peer == "hivemind" and case.peer_limit_s is not None:
        rows.append(against_one_step(case, name, figures[OURS], tell))
    return rows


def against_one_step(case: Case, name: str, mine: Sequence[float], tell: Teller) -> Row:
    """A row for a size at which hivemind takes too long to take turns."""
    with (
        tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder,
        tell.busy(f"{name}: one step of hivemind, for {case.peer_limit_s:.0f} s at most"),
    ):
        figure, note = one_step_of_theirs(case, Path(folder) / "hivemind.log")
    return replace(compare(name, METRIC, mine, HIVEMIND, [figure]), note=note)


def hivemind_can(case: Case) -> bool:
    """Few enough experts, and as wide as its experts are: four times the model's width."""
    return case.experts < 256 and case.hidden == 4 * case.d_model


def rows_of(case: Case, name: str, figures: dict[str, list[float]]) -> list[Row]:
    """Ours against each of the others."""
    mine: Sequence[float] = figures[OURS]
    rows = [compare(name, METRIC, mine, other, figures[other]) for other in figures if other != OURS]
    if not hivemind_can(case):
        rows.append(not_compared(name, METRIC, mine, HIVEMIND, HIVEMIND_NOT_RUN))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(DispatchBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
