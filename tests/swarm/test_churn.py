"""Hosts are killed and others join while a swarm trains: no block is lost, no trainer fails, the loss is the same.

A killed host's blocks are missed only when its records expire; a joiner then takes them over. Both take up to about
half a minute (`node.placement`: TTL_S + REFRESH_S + checks + transfer), longer than the 20 s between two kills, so that
two dead hosts' replicas may be missing at once. Hence three replicas of each block: with two, killing both holders of a
block within that time loses what it has learnt, and nothing but luck prevents it. Hosts start one after the other, as
each one's choice of blocks rests on what the others have announced.

The learning rate is constant, so that a run's loss depends only on the tokens that it has trained on: the churn has its
time by the clock, and the undisturbed run then trains each of its trainers for as many steps as that one got to.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from coordinator.blocks import block_list_text, split_blocks
from node.config import SwarmConfig
from node.swarm import SwarmClient
from protocol.manifest import AveragingConfig
from tests.support.churn import Churn, ChurnConfig
from tests.support.processes import RUN_NODE, ProcessSwarm, process_swarm, wait_until
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.processes import Node

N_HOSTS = 6
MAX_BLOCKS = 10
"""Of 16, so that five hosts have room for three replicas of each, and hardly more."""

MANIFEST = small_manifest(
    model={"experts_per_layer": 64, "experts_per_block": 8, "experts_per_token": 4, "d_model": 64, "context": 64},
    optimizer={
        "lr": 3e-3,
        "expert_lr": 3e-3,
        "warmup_tokens": 5000,
        "total_tokens": 1_000_000_000,
        "final_lr_fraction": 1.0,
    },
    averaging=AveragingConfig(target_replicas=3, period_s=4.0),
)
AUTO = ("--blocks", "auto", "--max-blocks", str(MAX_BLOCKS), "--recheck-s", "2")
TRAIN = (
    "--batch", "16", "--micro-batches", "1", "--n-shards", "2", "--eval-every", "0", "--eval-bytes", "2048",
    "--save-every", "100000",
)  # fmt: skip
TOLERANCE = 0.02
HELD_OUT_BYTES = 65_536
MIN_STEPS = 600
"""Of each trainer: they go on after a minute's churn, as a loss that still falls steeply compares badly."""

TIMEOUT_S = 90.0
STEPS_TIMEOUT_S = 300.0


def start_trainers(swarm: ProcessSwarm, steps: Sequence[int] = (0, 0)) -> list[Node]:
    """Two, each with its share of the text; returns when both train."""
    flags = [("--shard", str(shard), "--steps", str(n)) for shard, n in enumerate(steps)]
    trainers = [swarm.trainer(f"trainer-{shard}", *flags[shard], *TRAIN) for shard in range(len(steps))]
    for trainer in trainers:
        trainer.wait_for("step", TIMEOUT_S)
    return trainers


def stop(trainer: Node) -> int:
    """Ends it as Ctrl+C would; returns the steps that it has done."""
    assert trainer.stop() == 130, trainer.child.log_tail()
    return int(trainer.events("stopped")[-1]["step"])


def no_exception_in(nodes: Sequence[Node]) -> None:
    for node in nodes:
        log = (node.folder / "log.txt").read_text()
        assert "Traceback" not in log, f"{node.folder.name}:\n{log}"


def held_out(swarm: ProcessSwarm) -> float:
    """Bits per byte with the first trainer's trunk and the swarm's experts as they are now."""
    out = swarm.folder / "trainer-0"
    flags = ("--swarm", str(swarm.swarm_file), "--out", str(out), "--n-bytes", str(HELD_OUT_BYTES))
    command = [sys.executable, RUN_NODE, "evaluate", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[0])


def disturbed(folder: Path, config: ChurnConfig) -> tuple[float, list[int]]:
    """Held-out bits per byte after the churn, and each trainer's steps."""
    with process_swarm(folder, MANIFEST) as swarm:
        with SwarmClient(SwarmConfig(swarm=swarm.swarm_file)) as client:
            churn = Churn(swarm, client, AUTO)
            for _ in range(N_HOSTS):
                churn.start_host().wait_for("announced")
            trainers = start_trainers(swarm)
            churn.run(config, trainers)
            for trainer in trainers:
                trainer.wait_for("step", STEPS_TIMEOUT_S, count=MIN_STEPS)
            steps = [stop(trainer) for trainer in trainers]
            fewest = min(min(check.replicas.values()) for check in churn.checks)
            print(f"killed at {churn.kill_times_s} s; no block with fewer than {fewest} live replicas")
        check_churn(churn, config)
        no_exception_in([*trainers, *churn.hosts])
        assert sum(trainer.events("step")[-1]["calls_failed"] for trainer in trainers) > 0, "no kill was felt"
        return held_out(swarm), steps


def check_churn(churn: Churn, config: ChurnConfig) -> None:
    assert len(churn.killed) == config.kills
    lost = {check.at_s: check.lost() for check in churn.checks if check.lost()}
    assert not lost, f"seconds after the first kill, and blocks that nobody served: {lost}"
    joiners = churn.hosts[N_HOSTS:]
    for joiner in joiners:
        versions = joiner.wait_for("announced")["versions"]
        assert min(versions.values(), default=0) > 0, "every block of a joiner has what others have learnt"


def undisturbed(folder: Path, steps: Sequence[int]) -> float:
    """Held-out bits per byte after the same steps of each trainer, with as many replicas, when nobody dies."""
    with process_swarm(folder, MANIFEST) as swarm:
        shares = split_blocks(MANIFEST.model, N_HOSTS, MANIFEST.averaging.target_replicas)
        hosts = [swarm.host(f"host-{i}", block_list_text(blocks)) for i, blocks in enumerate(shares)]
        for host in hosts:
            host.wait_for("announced")
        trainers = start_trainers(swarm, steps)
        for trainer in trainers:
            trainer.wait_for("done", timeout_s=STEPS_TIMEOUT_S)
            wait_until(trainer.child.ended, "the trainer left")
            assert trainer.stop() == 0, trainer.child.log_tail()
        no_exception_in([*trainers, *hosts])
        return held_out(swarm)


def with_and_without(folder: Path, config: ChurnConfig) -> tuple[float, float]:
    """Held-out bits per byte with churn, and without, after the same steps."""
    with_churn, steps = disturbed(folder / "disturbed", config)
    without = undisturbed(folder / "undisturbed", steps)
    print(f"{with_churn} held-out bits per byte with churn, {without} without, after {steps} steps")
    return with_churn, without


@pytest.mark.timeout(900)  # a minute of churn, and as much to compare with: three minutes of both cores
def test_a_host_killed_and_another_joining_every_20_s_for_a_minute_change_nothing(tmp_path: Path) -> None:
    disturbed_loss, loss = with_and_without(tmp_path, ChurnConfig(kills=3))
    assert disturbed_loss == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_host_killed_and_another_joining_every_20_s_for_three_minutes_change_nothing(tmp_path: Path) -> None:
    disturbed_loss, loss = with_and_without(tmp_path, ChurnConfig(kills=9, seed=1))
    assert disturbed_loss == pytest.approx(loss, rel=TOLERANCE)
