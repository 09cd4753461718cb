"""python -m tests.benchmarks.replicas --json runs/bench/replicas.json

What replicas and a second trainer cost in quality. Two trainers over six hosts with two replicas of each of 1,024
experts, against one trainer over six hosts with one of each, for the same tokens in all: held-out bits per byte, how
far the replicas of each block are apart while training goes on, and how soon they agree once it stops. One run of each;
the swarms are started afresh, one after the other. `--tokens 60000` is a quick look.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from coordinator.blocks import block_list_text, split_blocks
from experiments.live.processes import POLL_S, process_swarm, wait_until
from node.model.checkpoint import read_checkpoint
from node.trainer.trunk_state import FILE_NAME
from protocol.manifest import AveragingCodec, AveragingConfig, Manifest, ModelConfig, OptimizerConfig
from tests.benchmarks.replica_observer import Observer, distance
from tests.benchmarks.report import Row, Teller, compare, document, not_compared, publish
from tests.support.leaks import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from experiments.live.processes import Node, ProcessSwarm
    from tests.benchmarks.replica_observer import Check

FULL_TOKENS = 819_200
N_HOSTS = 6
DIVERGENCE_LIMIT = 0.05
SETTLED = 0.001
SETTLE_LIMIT_S = 30.0
CHECK_S, SETTLING_CHECK_S = 10.0, 2.0
SETTLE_PATIENCE_S = 60.0
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 180.0
MIN_TOKENS_PER_S = 250.0
"""A swarm that is slower is given up."""

MB = 1e6
LOSS, LARGEST, MEAN = "held-out bits per byte", "largest divergence of a block", "mean divergence of a block"
LARGEST_MET = "largest divergence of a block, before an exchange"
SETTLING = "seconds until every block is within 0.1 %"
TRUNKS, SPEED, EXCHANGED = "distance of the two final trunks", "tokens/s", "MB exchanged by replicas"
BASELINE = "1 trainer, 1 replica"
NOTES = (
    "one run of each; the default manifest: 2 layers x 512 experts in blocks of 32, D=128; Wikipedia's text",
    (
        "divergence: relative L2 distance of the weights of a block's two replicas, both downloaded at nearly the same "
        "moment; training goes on between the two copies, so that it is a little over what it is at any one moment"
    ),
    "before an exchange: what the hosts themselves found, at every exchange of a block, from copies of both replicas",
    (
        f"seconds until within 0.1 %: from the last step of the last trainer, with a look every {SETTLING_CHECK_S:g} s "
        "or so; the trainers' last evaluation falls into this time"
    ),
    "tokens/s: all trainers together, from the first step to the last; all processes of a swarm share this machine",
)


@dataclass(frozen=True, kw_only=True)
class ReplicasBenchmark:
    """Quality of two trainers and two replicas of each block against one and one."""

    json: Path
    """File for the rows."""
    tokens: int = FULL_TOKENS
    """Of each run, all trainers together; fewer than the default are for a look, not for the docs."""
    seed: int = 0
    """Of weights and data."""
    batch: int = 4
    """Sequences per micro-batch of each of the two trainers; the one has as many as both."""
    micro_batches: int = 2
    """Micro-batches per step."""
    period_s: float = AveragingConfig.period_s
    """Seconds between the exchanges that a node begins."""
    codec: AveragingCodec = AveragingConfig.codec
    """Of what replicas exchange."""
    max_rate_scale: float = AveragingConfig.max_rate_scale
    """Bound of the trunk's rate's growth with trainers; 1: none."""

    def manifest(self, replicas: int) -> Manifest:
        """Of a run with so many replicas."""
        averaging = AveragingConfig(
            target_replicas=replicas, period_s=self.period_s, codec=self.codec, max_rate_scale=self.max_rate_scale
        )
        optimizer = OptimizerConfig(total_tokens=self.tokens)
        return Manifest(name="bench", seed=self.seed, optimizer=optimizer, averaging=averaging)

    def train_flags(self, trainers: int, shard: int) -> tuple[str, ...]:
        """Of one of so many trainers: for its part of the tokens, without evaluations on the way."""
        batch = self.batch * 2 // trainers
        flags = {
            "--batch": batch,
            "--micro-batches": self.micro_batches,
            "--shard": shard,
            "--n-shards": trainers,
            "--steps": self.tokens // (trainers * batch * self.micro_batches * ModelConfig.context),
            "--eval-every": 0,
            "--seed": self.seed,
        }
        return tuple(word for flag, value in flags.items() for word in (flag, str(value)))

    def timeout_s(self) -> float:
        """For one run to train."""
        return START_TIMEOUT_S + self.tokens / MIN_TOKENS_PER_S


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one swarm came to. `settled_s` is None where the replicas did not agree in time, or there are none."""

    bits_per_byte: float
    tokens: int
    tokens_per_s: float
    checks: tuple[Check, ...] = ()
    settling: tuple[Check, ...] = ()
    settled_s: float | None = None
    met_max: float = 0.0
    exchanged_bytes: int = 0
    trunk_distance: float = 0.0


def main(config: ReplicasBenchmark) -> None:
    """Measure, write, print."""
    adopt_orphans()
    tell = Teller()
    with tempfile.TemporaryDirectory(prefix="kilohive-bench-") as folder:
        baseline = run_arm(Path(folder) / "baseline", config, 1, tell)
        replicated = run_arm(Path(folder) / "replicated", config, 2, tell)
    publish(config.json, content_of(config, baseline, replicated))


def run_arm(folder: Path, config: ReplicasBenchmark, copies: int, tell: Teller) -> Arm:
    """A swarm with so many trainers, and replicas of each block, from its start to its end."""
    manifest, name = config.manifest(copies), f"{copies} x {copies}"
    with ExitStack() as stack:
        with tell.busy(f"{name}: starting a coordinator, {N_HOSTS} hosts and {copies} trainer(s)"):
            swarm = stack.enter_context(process_swarm(folder, manifest))
            hosts = start_hosts(swarm, manifest, copies)
            observer = stack.enter_context(Observer(swarm.swarm_file)) if copies > 1 else None
            trainers = [swarm.trainer(f"trainer-{i}", *config.train_flags(copies, i)) for i in range(copies)]
            for trainer in trainers:
                trainer.wait_for("step", START_TIMEOUT_S)
        checks = watch_training(trainers, observer, config, lambda text: tell(f"{name}: {text}"))
        settling, settled_s = settle(trainers, observer, lambda text: tell(f"{name}: {text}"))
        return arm_of(hosts, trainers, checks, settling, settled_s)


def start_hosts(swarm: ProcessSwarm, manifest: Manifest, replicas: int) -> list[Node]:
    """All hosts, announced."""
    shares = split_blocks(manifest.model, N_HOSTS, replicas)
    hosts = [swarm.host(f"host-{i}", block_list_text(blocks)) for i, blocks in enumerate(shares)]
    for host in hosts:
        host.wait_for("announced", START_TIMEOUT_S)
    return hosts


def watch_training(
    trainers: Sequence[Node], observer: Observer | None, config: ReplicasBenchmark, tell: Callable[[str], None]
) -> list[Check]:
    """Until every trainer has taken its last step; a check of the replicas every CHECK_S seconds, if there are any."""
    checks: list[Check] = []
    deadline = time.monotonic() + config.timeout_s()
    while not all(map(trained, trainers)):
        pause(CHECK_S, lambda: all(map(trained, trainers)))
        if time.monotonic() > deadline:
            raise RuntimeError(f"not trained within {config.timeout_s():.0f} s; {trainers[0].child.log_tail()}")
        words = [f"{own_tokens(trainers):,} of {config.tokens:,} tokens"]
        if observer and not all(map(trained, trainers)):
            checks.append(observer.check())
            words.append(checks[-1].words())
        tell(", ".join(words))
    return checks


def settle(
    trainers: Sequence[Node], observer: Observer | None, tell: Callable[[str], None]
) -> tuple[list[Check], float | None]:
    """Until the trainers have ended and the replicas agree; checks, and seconds from the last step until they did."""
    checks: list[Check] = []
    stopped_s = max(trainer.events("step")[-1]["t"] for trainer in trainers)
    settled_s = None
    while observer and settled_s is None and time.time() < stopped_s + SETTLE_PATIENCE_S:
        checks.append(observer.check())
        settled_s = settled_after_s(checks, stopped_s)
        tell(f"training has stopped {time.time() - stopped_s:.0f} s ago, {checks[-1].words()}")
        pause(SETTLING_CHECK_S, lambda: False)
    for trainer in trainers:
        trainer.wait_for("done", END_TIMEOUT_S)
        wait_until(trainer.child.ended, "the trainer left", END_TIMEOUT_S)
    return checks, settled_s


def settled_after_s(checks: Sequence[Check], stopped_s: float) -> float | None:
    """Seconds from the end of training to the first check that found every block settled; None if none did."""
    times_s = [check.ended_s for check in checks if check.complete and check.largest <= SETTLED]
    return min(times_s) - stopped_s if times_s else None


def arm_of(
    hosts: Sequence[Node],
    trainers: Sequence[Node],
    checks: Sequence[Check],
    settling: Sequence[Check],
    settled_s: float | None,
) -> Arm:
    """What the nodes and the observer have written, in numbers."""
    # Trainers do not end together, and the first to end has not seen all of the tokens.
    last = max(trainers, key=lambda trainer: trainer.events("step")[-1]["t"])
    done = last.events("done")[-1]
    exchanges = [event for node in (*hosts, *trainers) for event in node.events("exchange") if event["dialled"]]
    met = [event["divergence_max"] for host in hosts for event in host.events("exchange")]
    trunks = [trunk_of(trainer.folder) for trainer in trainers]
    return Arm(
        bits_per_byte=done["bits_per_byte_end"],
        tokens=own_tokens(trainers),
        tokens_per_s=speed([trainer.events("step") for trainer in trainers]),
        checks=tuple(checks),
        settling=tuple(settling),
        settled_s=settled_s,
        met_max=max(met, default=0.0),
        exchanged_bytes=sum(event["bytes"] for event in exchanges),
        trunk_distance=distance(trunks[0], trunks[-1]),
    )


def trained(trainer: Node) -> bool:
    """Whether it has taken its last step."""
    step = trainer.wait_for("step")
    return bool(step["step"] >= step["steps"])


def own_tokens(trainers: Sequence[Node]) -> int:
    """Of all trainers together, so far."""
    return sum(trainer.events("step")[-1]["own_tokens"] for trainer in trainers)


def speed(steps_of: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Tokens per second of all trainers together. Each one's first step is where its clock begins: it has no length."""
    rates: list[float] = []
    for steps in steps_of:
        first, last = steps[0], steps[-1]
        rates.append((last["own_tokens"] - first["own_tokens"]) / (last["t"] - first["t"]))
    return sum(rates)


def trunk_of(folder: Path) -> dict[str, torch.Tensor]:
    """A trainer's last trunk: weights and the gates' biases."""
    stored = read_checkpoint(folder / FILE_NAME)
    if stored is None:
        raise RuntimeError(f"{folder.name} left no trunk")
    return {name: t for name, t in stored[0].items() if name.startswith("model.") and t.is_floating_point()}


def pause(seconds: float, enough: Callable[[], bool]) -> None:
    """Wait so long, or until it is enough."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not enough():
        time.sleep(POLL_S)


def rows_of(baseline: Arm, replicated: Arm) -> list[Row]:
    """Every figure of the two trainers against the one, or against its limit: a ratio up to 1 keeps that."""
    case = f"2 trainers, {N_HOSTS} hosts, 2 replicas of 1,024 experts"
    means = [check.mean for check in replicated.checks]
    largest = [check.largest for check in replicated.checks]
    if not largest:
        raise RuntimeError("training was over before the first check of the replicas: take more --tokens")
    return [
        compare(case, LOSS, [replicated.bits_per_byte], BASELINE, [baseline.bits_per_byte]),
        compare(case, LARGEST, [max(largest)], "limit", [DIVERGENCE_LIMIT]),
        compare(case, LARGEST_MET, [replicated.met_max], "limit", [DIVERGENCE_LIMIT]),
        not_compared(case, MEAN, [statistics.mean(means)], "-", f"mean over {len(means)} checks"),
        settling_row(case, replicated),
        not_compared(case, TRUNKS, [replicated.trunk_distance], "-", "relative L2, of the trainers' last checkpoints"),
        compare(case, SPEED, [replicated.tokens_per_s], BASELINE, [baseline.tokens_per_s]),
        not_compared(
            case, EXCHANGED, [replicated.exchanged_bytes / MB], "-", "both ways, of blocks and trunks; MB of 1e6 bytes"
        ),
    ]


def settling_row(case: str, replicated: Arm) -> Row:
    """Against its limit; replicas that never agreed stand as the seconds for which they were watched."""
    never = replicated.settled_s is None
    row = compare(
        case, SETTLING, [SETTLE_PATIENCE_S if never else replicated.settled_s or 0.0], "limit", [SETTLE_LIMIT_S]
    )
    return replace(row, note=f"not within {SETTLE_PATIENCE_S:.0f} s") if never else row


def content_of(config: ReplicasBenchmark, baseline: Arm, replicated: Arm) -> dict[str, Any]:
    """The JSON: rows, and every check."""
    notes = (
        *NOTES,
        f"tokens trained on: {replicated.tokens:,} by two trainers, {baseline.tokens:,} by one",
        (
            f"averaging every {config.period_s:g} s in {config.codec}; a trunk's rate grows with the trainers that it "
            f"is averaged with, up to {config.max_rate_scale:g} times; seed {config.seed}"
        ),
        *checks_words(replicated),
    )
    if config.tokens < FULL_TOKENS:
        notes = (*notes, f"only {config.tokens:,} tokens: not for the docs")
    checks = {"training": replicated.checks, "after training": replicated.settling}
    return {
        **document("replicas", rows_of(baseline, replicated), notes),
        "checks": {when: [asdict(check) for check in some] for when, some in checks.items()},
    }


def checks_words(replicated: Arm) -> tuple[str, ...]:
    """A note if some replicas could not be looked at."""
    missed = sum(check.missed for check in (*replicated.checks, *replicated.settling))
    return (f"blocks that could not be looked at, over all checks: {missed}",) if missed else ()


if __name__ == "__main__":
    try:
        main(tyro.cli(ReplicasBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
