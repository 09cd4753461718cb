"""python -m tests.benchmarks.averaging --json runs/bench/averaging.json

The product's pairwise averaging against hivemind's DecentralizedAverager: peers with random weights average until every
one of them is within 1 % of the mean. Seconds, bytes that each peer sends, memory of each peer's processes, and how
long the others take to agree when one peer freezes in the middle of a round. They take turns; figures are medians.
`--sizes-mb 1 --peers 2 --runs 1 --no-fault --no-codecs` is a quick look.

Every peer is a process of its own on both sides, with its own DHT node and p2pd. hivemind's is started as its users
start it: DHT, p2pd and averager in three more processes. Ours has the parts of a host that averaging needs.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tests.benchmarks.averaging_fleet import FAULT_LIMIT_S, FleetConfig, running
from tests.benchmarks.peer_process import end_descendants
from tests.benchmarks.report import Row, Teller, compare, document, publish, schedule
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.benchmarks.averaging_fleet import Fleet, Round

OURS, BF16, INT8, HIVEMIND = "fp32", "bf16", "int8", "hivemind"
MIN_RUNS = 5
WATCHED_RUNS = 2
MB = 1e6
CODEC_CASE = FAULT_CASE = (10, 4)
FAULT_PATIENCE_S = 20.0
"""What hivemind is given for one all-reduce in the fault; by default it waits for ever, hivemind.Optimizer a minute."""
SECONDS, SENT = "seconds until all are within 1 %", "MB sent per peer"
REST, PEAK = "PSS MB per peer, between rounds", "PSS MB per peer, peak"
RECOVERY = "seconds until the others agree within 1 %"
NOTES = (
    (
        "weights alone, as blocks of 1 MB of 1e6 bytes, fp32; the same random starts on both sides; "
        "fp32 on the wire unless a case names another codec"
    ),
    (
        "seconds: from the command to begin until the last peer came within 1 % (relative L2, on 4,096 values at even "
        "distances) of the mean of the starts; processes are up, and know each other, before"
    ),
    (
        "both find their partners through their own DHT: hivemind's matchmaking is in its seconds, "
        "our directory is kept fresh beside"
    ),
    (
        "hivemind averages all peers of a round at once and is told to begin at the same moment; ours meet in pairs, "
        "whom its averager picks, at a period of --period-s; clip radius 10, so that nothing is clipped"
    ),
    (
        "MB sent: ours counts messages' bytes of every exchange that was begun before all agreed; "
        "hivemind's are those of its TCP sockets, from ss"
    ),
    (
        "a round that has not agreed at its limit (60 s, and half a second for each MB of all peers, 400 s at most) "
        "counts as at the limit: an all-reduce that lost a part of a peer ends at another mean"
    ),
    (
        "memory: python, p2pd and all other processes of a peer, in rounds of their own that are not timed; "
        "peak is the mean of the peers' largest samples"
    ),
    (
        f"fault: one of the peers gets SIGSTOP, its whole tree, when its tensors begin to move; the limit is "
        f"{FAULT_LIMIT_S:.0f} s; hivemind gives an all-reduce up after {FAULT_PATIENCE_S:.0f} s there"
    ),
    (
        "hivemind: target group size is the number of peers, next_chunk_timeout its matchmaking time of 5 s as in "
        "hivemind.Optimizer, other settings its defaults; its pipes are made blocking again, without which it may die"
    ),
)


@dataclass(frozen=True, kw_only=True)
class AveragingBenchmark:
    """Time, bytes, memory and a fault of averaging: our exchanges of pairs against hivemind's all-reduce."""

    json: Path
    """File for the rows."""
    sizes_mb: str = "1,10,100"
    """Of a peer's weights, parted by commas."""
    peers: str = "2,4,8"
    """How many average with each other, parted by commas."""
    runs: int = MIN_RUNS
    """Counted rounds of each; fewer than 5 are for a look. The largest cases have fewer, as their rows tell."""
    period_s: float = 0.5
    """Seconds between the exchanges that one of our peers begins."""
    codecs: bool = True
    """Also our other codecs, at one size."""
    fault: bool = True
    """Also with a peer that freezes."""


def main(config: AveragingBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell = Teller()
    rows: list[Row] = []
    try:
        for size_mb in numbers(config.sizes_mb, "--sizes-mb"):
            for peers in numbers(config.peers, "--peers"):
                rows += measure(size_mb, peers, (OURS,), config, tell)
        if config.codecs:
            rows += measure(*CODEC_CASE, (BF16, INT8), config, tell)
        if config.fault:
            rows.append(measure_fault(*FAULT_CASE, config, tell))
    finally:
        end_descendants()
    notes = NOTES if config.runs >= MIN_RUNS else (*NOTES, f"only {config.runs} runs: not for the docs")
    publish(config.json, document("averaging", rows, notes))


def numbers(text: str, flag: str) -> list[int]:
    """Whole numbers parted by commas; SystemExit naming the flag for anything else."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise SystemExit(f"{flag}: must be whole numbers from 1 on, parted by commas, is {text!r}")
    return [int(part) for part in text.split(",")]


def counted_runs(size_mb: int, peers: int, runs: int) -> int:
    """Fewer where a round takes minutes: all of it is to end within half an hour on two cores."""
    return min(runs, max(1, 400 // (size_mb * peers)))


def round_limit_s(size_mb: int, peers: int) -> float:
    """Many times what a round takes; peers that have not agreed by then count as at the limit."""
    return min(400.0, 60.0 + 0.5 * size_mb * peers)


def case_name(size_mb: int, peers: int, codec: str) -> str:
    """As it stands in the rows."""
    return f"{size_mb} MB, {peers} peers" + ("" if codec == OURS else f", {codec}")


def fleet_of(name: str, size_mb: int, peers: int, period_s: float) -> FleetConfig:
    """Ours by its codec, or hivemind."""
    limit_s = round_limit_s(size_mb, peers)
    if name == HIVEMIND:
        return FleetConfig(
            module="tests.benchmarks.hivemind_averager",
            peers=peers,
            blocks=size_mb,
            stepwise=True,
            round_limit_s=limit_s,
        )
    return FleetConfig(
        module="tests.benchmarks.averaging_peer",
        peers=peers,
        blocks=size_mb,
        stepwise=False,
        round_limit_s=limit_s,
        arguments=("--codec", name, "--period-s", str(period_s)),
    )


def measure(size_mb: int, peers: int, ours: Sequence[str], config: AveragingBenchmark, tell: Teller) -> list[Row]:
    """Rows of one size: each of ours against hivemind."""
    runs = counted_runs(size_mb, peers, config.runs)
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder, ExitStack() as stack:
        fleets: dict[str, Fleet] = {}
        for name in (*ours, HIVEMIND):
            with tell.busy(f"{case_name(size_mb, peers, name)}: starting {peers} peers"):
                fleet = fleet_of(name, size_mb, peers, config.period_s)
                fleets[name] = stack.enter_context(running(fleet, Path(folder) / name))
        timed = rounds(fleets, runs, tell, watch=False)
        watched = rounds(fleets, min(runs, WATCHED_RUNS), tell, watch=True)
    few = f"{runs} counted rounds instead of {config.runs}" if runs < config.runs else ""
    rows: list[Row] = []
    for codec in ours:
        late = missed({"ours": timed[codec], HIVEMIND: timed[HIVEMIND]}, round_limit_s(size_mb, peers))
        note = "; ".join(filter(None, (few, late)))
        case = case_name(size_mb, peers, codec)
        found = rows_of(case, (timed[codec], watched[codec]), (timed[HIVEMIND], watched[HIVEMIND]))
        rows += [replace(row, note=note) for row in found]
    return rows


def rounds(fleets: Mapping[str, Fleet], runs: int, tell: Teller, *, watch: bool) -> dict[str, list[Round]]:
    """In turns. What is timed has a warm-up round first, unless it is so large that it has few rounds."""
    measured: dict[str, list[Round]] = {name: [] for name in fleets}
    for name, number in schedule(list(fleets), runs):
        if not number and (watch or runs < MIN_RUNS):
            continue
        done = fleets[name].round(number, watch=watch)
        what = "memory, " * watch + (f"round {number} of {runs}" if number else "warm-up")
        figures = f"{done.seconds:.2f} s, {done.sent_bytes / MB:.1f} MB, PSS {done.rest_bytes / MB:.0f} MB"
        tell(f"{what}: {name} {figures}" + ("" if done.agreed else ", not agreed"))
        if number:
            measured[name].append(done)
    return measured


def missed(rounds_of: Mapping[str, Sequence[Round]], limit_s: float) -> str:
    """Who had not agreed at the limit, and how often; empty if everybody always had."""
    never = {who: sum(not done.agreed for done in done_by) for who, done_by in rounds_of.items()}
    return ", ".join(
        f"{who} not within {limit_s:.0f} s in {count} of {len(rounds_of[who])} rounds"
        for who, count in never.items()
        if count
    )


def rows_of(case: str, ours: tuple[list[Round], list[Round]], theirs: tuple[list[Round], list[Round]]) -> list[Row]:
    """Of each side its timed rounds, then those in which its memory was watched."""
    figures: dict[str, tuple[int, Callable[[Round], float]]] = {
        SECONDS: (0, lambda done: done.seconds),
        SENT: (0, lambda done: done.sent_bytes / MB),
        REST: (1, lambda done: done.rest_bytes / MB),
        PEAK: (1, lambda done: done.peak_bytes / MB),
    }
    return [
        compare(case, metric, [of(done) for done in ours[which]], HIVEMIND, [of(done) for done in theirs[which]])
        for metric, (which, of) in figures.items()
    ]


def measure_fault(size_mb: int, peers: int, config: AveragingBenchmark, tell: Teller) -> Row:
    """One peer freezes; a fresh fleet for each run, as a frozen peer stays frozen."""
    seconds: dict[str, list[float]] = {OURS: [], HIVEMIND: []}
    for name, number in schedule(list(seconds), config.runs):
        if not number:
            continue
        fleet = fleet_of(name, size_mb, peers, config.period_s)
        if name == HIVEMIND:
            fleet = replace(fleet, arguments=("--allreduce-timeout-s", str(FAULT_PATIENCE_S)))
        with (
            tell.busy(f"{name}: {peers} peers, one will freeze"),
            tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder,
            running(fleet, Path(folder)) as started,
        ):
            started.round(0)
            seconds[name].append(started.fault_seconds(number))
        tell(f"fault, round {number} of {config.runs}: {name} {seconds[name][-1]:.1f} s")
    return fault_row(f"{case_name(size_mb, peers, OURS)}, one freezes", seconds[OURS], seconds[HIVEMIND])


def fault_row(case: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """A figure at the limit means that they had not agreed by then; the note counts those."""
    never = {
        who: sum(seconds >= FAULT_LIMIT_S for seconds in figures)
        for who, figures in (("ours", ours), (HIVEMIND, theirs))
    }
    note = ", ".join(
        f"{who} not within {FAULT_LIMIT_S:.0f} s in {count} of {len(ours)} runs"
        for who, count in never.items()
        if count
    )
    return replace(compare(case, RECOVERY, ours, HIVEMIND, theirs), note=note)


if __name__ == "__main__":
    try:
        main(tyro.cli(AveragingBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
