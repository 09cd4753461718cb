"""Power cuts: a host's, the coordinator's, every host's. Real processes, SIGKILL."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from experiments.live.processes import ProcessSwarm, wait_until
from node.host.block_store import block_path
from node.model.checkpoint import read_checkpoint
from protocol.manifest import BlockId
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.live.processes import Node

# 32 experts a layer, 4 of them for each token, over three hosts: a kill takes some of nearly every token's experts.
MANIFEST = small_manifest(
    model={"experts_per_layer": 32, "experts_per_token": 4, "d_model": 32, "expert_hidden": 16, "context": 32},
    optimizer={"lr": 5e-3, "expert_lr": 5e-3, "total_tokens": 60 * 8 * 32, "warmup_tokens": 500},
)
HOSTS = {"host-0": "0/0-2,1/0-1", "host-1": "0/3-5,1/2-4", "host-2": "0/6-7,1/5-7"}
FLAGS = ("--batch", "4", "--eval-every", "0", "--set", "eval_bytes=2048", "--save-every", "1000")
TRAIN = ("--steps", "60", *FLAGS)
UNTIL_STOPPED = ("--steps", "100000", *FLAGS)


def start_hosts(swarm: ProcessSwarm) -> dict[str, Node]:
    """Returns before they are announced: trainers wait for them."""
    return {name: swarm.host(name, blocks) for name, blocks in HOSTS.items()}


def finish(trainer: Node) -> dict[str, Any]:
    done = trainer.wait_for("done", timeout_s=100)
    wait_until(trainer.child.ended, "the trainer left")
    assert trainer.stop() == 0, trainer.child.log_tail()
    log = (trainer.folder / "log.txt").read_text()
    assert "Traceback" not in log, log
    return done


def test_a_host_killed_at_step_20_of_60_costs_its_experts_and_nothing_else(swarm: ProcessSwarm, text: Path) -> None:
    hosts = start_hosts(swarm)
    trainer = swarm.trainer("trainer", "--data", str(text), *TRAIN)
    trainer.wait_for("step", count=20)
    hosts["host-1"].kill()
    killed_at = len(trainer.events("step"))
    done = finish(trainer)

    steps = trainer.events("step")
    assert [step["step"] for step in steps] == list(range(1, 61))
    assert steps[-1]["experts_alive"] < steps[0]["experts_total"]
    assert done["calls_failed"] >= 1
    losses = [step["loss"] for step in steps]
    assert sum(losses[-5:]) < sum(losses[killed_at - 5 : killed_at]), "the loss still falls after the kill"
    assert done["bits_per_byte_end"] < done["bits_per_byte_start"] - 1

    # Records of the dead host expire 20 s after its last word.
    wait_until(lambda: len(swarm.status()["blocks_lost"]) == 6, "status shows the lost blocks", 40)
    assert swarm.status()["blocks_lost"] == ["0/3", "0/4", "0/5", "1/2", "1/3", "1/4"]


def start_at_once(swarm: ProcessSwarm, name: str, blocks: str) -> Node:
    """A host that begins blocks anew without waiting for those that may have them."""
    return swarm.start(
        name, "host", "--join", str(swarm.swarm_file), "--state", str(swarm.folder / name),
        "--blocks", blocks, "--set", "anew_after_s=0",
    )  # fmt: skip


def start_host_with_checkpoints(swarm: ProcessSwarm, name: str, blocks: str) -> Node:
    return swarm.start(
        name, "host", "--join", str(swarm.swarm_file), "--state", str(swarm.folder / name),
        "--blocks", blocks, "--set", "checkpoint_every_s=0.2",
    )  # fmt: skip


def test_a_killed_host_started_again_resumes_its_blocks_versions(swarm: ProcessSwarm, text: Path) -> None:
    for name in ("host-0", "host-1"):
        swarm.host(name, HOSTS[name])
    host = start_host_with_checkpoints(swarm, "host-again", HOSTS["host-2"])
    trainer = swarm.trainer("trainer", "--data", str(text), *TRAIN)
    trainer.wait_for("step", count=5)
    host.wait_for("checkpoint", count=2)
    host.kill()
    stored = {}
    for block_id in (BlockId(0, 6), BlockId(0, 7), BlockId(1, 5), BlockId(1, 6), BlockId(1, 7)):
        checkpoint = read_checkpoint(block_path(host.folder, block_id))
        assert checkpoint is not None
        stored[str(block_id)] = int(checkpoint[1]["version"])
    again = swarm.host("host-again", HOSTS["host-2"])
    announced = again.wait_for("announced", count=2)
    assert announced["versions"] == stored
    assert min(stored.values()) >= 2
    finish(trainer)


@pytest.mark.slow  # without processes in tests/integration/test_download.py
def test_a_host_that_takes_a_block_with_a_live_replica_downloads_it_and_both_average(
    swarm: ProcessSwarm, text: Path
) -> None:
    hosts = start_hosts(swarm)
    # Until both have exchanged: replicas of which nothing learns leave each other alone.
    trainer = swarm.trainer("trainer", "--data", str(text), *UNTIL_STOPPED)
    trainer.wait_for("step", count=10)
    late = swarm.host("late", "0/0-1")
    announced = late.wait_for("announced")
    assert announced["versions"].keys() == {"0/0", "0/1"}
    assert min(announced["versions"].values()) > 0
    assert {event["block"] for event in late.events("joined")} == {"0/0", "0/1"}
    assert {event["source"] for event in late.events("joined")} == {"replicas"}
    late.wait_for("exchange", count=2)
    hosts["host-0"].wait_for("exchange", count=2)
    assert not [event for event in late.events("exchange") if event["clipped"]]
    hosts["host-0"].kill()
    trainer.wait_for("step", count=len(trainer.events("step")) + 20)
    assert trainer.stop() == 130, trainer.child.log_tail()
    wait_until(lambda: "0/0" not in swarm.status()["blocks_lost"], "the second replica is there")


def test_training_goes_on_without_the_coordinator_and_a_new_host_joins_through_another_peer(
    swarm: ProcessSwarm, text: Path
) -> None:
    hosts = start_hosts(swarm)
    trainer = swarm.trainer("trainer", "--data", str(text), *TRAIN)
    trainer.wait_for("step", count=5)
    swarm.coordinator.kill()
    late = swarm.host("late", "0/0-7", swarm.swarm_file_through(hosts["host-0"]))
    late.wait_for("announced")
    finish(trainer)
    assert late.stop() == 0


@pytest.mark.slow  # half a minute of waiting
def test_without_any_host_trainers_wait_say_so_leave_at_once_when_asked_and_go_on_when_hosts_appear(
    swarm: ProcessSwarm, text: Path
) -> None:
    trainer = swarm.trainer("trainer", "--data", str(text), *TRAIN)
    other = swarm.trainer("other", "--data", str(text), *TRAIN)
    waiting = trainer.wait_for("waiting")
    assert "16 of 16 blocks have no live replica" in waiting["for"]
    other.wait_for("waiting")
    asked = time.monotonic()
    assert other.stop() == 130
    assert time.monotonic() - asked < 3
    assert not trainer.events("step")
    hosts = start_hosts(swarm)
    trainer.wait_for("step", count=10)
    for host in hosts.values():
        host.kill()
    before = len(trainer.events("waiting"))
    trainer.wait_for("waiting", count=before + 1)
    for name, blocks in HOSTS.items():
        start_at_once(swarm, name, blocks)
    done = finish(trainer)
    assert done["steps"] == 60
