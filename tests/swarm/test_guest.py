"""A host that pauses, comes back, leaves and sleeps while others train: nothing is lost, and nobody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from common.text import moment_text
from experiments.live.processes import RUN_NODE, Node, ProcessSwarm, wait_until
from node.host.signals import SIGNALS
from protocol.manifest import AveragingConfig
from tests.support.ports import free_port
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = small_manifest(
    optimizer={"total_tokens": 1_000_000_000}, averaging=AveragingConfig(target_replicas=2, period_s=1.0)
)
N_BLOCKS = 8
AUTO = ("--blocks", "auto", "--max-blocks", str(N_BLOCKS), "--set", "recheck_s=2", "--threads", "1")
TRAIN = ("--steps", "100000", "--batch", "2", "--micro-batches", "1", "--eval-every", "0", "--set", "eval_bytes=256")
LEAVE_S = 20.0
TIMEOUT_S = 60.0


def host(swarm: ProcessSwarm, name: str, *flags: str) -> Node:
    place = ("--join", str(swarm.swarm_file), "--state", str(swarm.folder / name))
    node = swarm.start(name, "host", *place, *AUTO, *flags)
    node.wait_for("announced")
    return node


def tell(word: str, node: Node, *more: str) -> str:
    command = (sys.executable, RUN_NODE, word, *more, "--state", str(node.folder), "--log-level", "warning")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr + node.child.log_tail()
    return done.stdout


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def peer(swarm: ProcessSwarm, node: Node) -> dict[str, Any]:
    peer_id = node.events("announced")[-1]["peer_id"]
    found: dict[str, Any] = next(peer for peer in swarm.status()["peers"] if peer["peer_id"] == peer_id)
    return found


def steps_on(trainer: Node) -> None:
    """It trains on, and none of its steps failed."""
    trainer.wait_for("step", TIMEOUT_S, count=len(trainer.events("step")) + 20)
    assert not trainer.child.ended(), trainer.child.log_tail()


@pytest.mark.slow  # pause by pause in tests/unit/node/host/test_pause.py
@pytest.mark.timeout(240)
def test_a_host_pauses_comes_back_and_leaves_while_a_trainer_trains_on(swarm: ProcessSwarm) -> None:
    guest, other = host(swarm, "guest"), host(swarm, "other")
    trainer = swarm.trainer("trainer", *TRAIN)
    trainer.wait_for("step", TIMEOUT_S, count=5)

    assert tell("pause", guest).startswith("paused, with its blocks stored in ")
    assert guest.events("paused")[-1]["stored"] == N_BLOCKS
    told = peer(swarm, guest)
    assert (told["paused"], told["n_blocks"]) == (True, 0)
    steps_on(trainer)
    assert swarm.status()["blocks_lost"] == []
    before = {event["block"] for event in guest.events("joined")}

    assert tell("resume", guest) == f"it works again, with {N_BLOCKS} blocks\n"
    fetched = {event["block"]: event for event in guest.events("joined") if event["block"] not in before}
    assert {event["source"] for event in fetched.values()} == {"replicas"}
    assert min(event["version"] for event in fetched.values()) > 0, "what was learnt meanwhile is there"
    assert not peer(swarm, guest)["paused"]

    began_s = time.monotonic()
    assert tell("leave", other).splitlines()[-1] == "left"
    assert time.monotonic() - began_s < LEAVE_S
    assert other.events("handed_over")[-1]["left"] == []
    steps_on(trainer)
    status = swarm.status()
    assert status["blocks_lost"] == []
    assert [one["role"] for one in status["peers"]].count("host") == 1
    assert trainer.stop() == 130


@pytest.mark.slow  # what `leave` says and does is tested before
@pytest.mark.timeout(240)
def test_the_last_replicas_go_to_whoever_takes_them_before_their_host_is_gone(swarm: ProcessSwarm) -> None:
    other = host(swarm, "heir")
    tell("pause", other)
    guest = host(swarm, "last")
    trainer = swarm.trainer("trainer-of-last", *TRAIN)
    trainer.wait_for("step", TIMEOUT_S, count=5)
    trainer.stop()
    before = len(other.events("joined"))

    os.kill(guest.child.pid, SIGNALS["leave"])
    guest.wait_for("leaving")
    tell("resume", other)
    assert guest.wait_for("handed_over")["left"] == []
    assert guest.stop() == 0
    taken = other.events("joined")[before:]
    assert len(taken) == N_BLOCKS
    assert min(event["version"] for event in taken) > 0, "what was learnt is not lost"
    assert swarm.status()["blocks_lost"] == []


def test_outside_its_schedule_a_host_waits_with_what_it_has(swarm: ProcessSwarm) -> None:
    now = time.localtime()
    hour = (now.tm_hour + 12) % 24
    guest = host(swarm, "scheduled", "--schedule", f"{hour:02}:00-{hour:02}:30")
    assert guest.wait_for("paused")["reasons"] == ["it is outside its schedule"]
    assert guest.events("announced")[-1]["versions"] == {}
    assert tell("resume", guest) == "no longer paused by its owner, but it is outside its schedule\n"
    assert tell("leave", guest).splitlines() == [
        "handing 0 blocks over",
        "others serve 0 of them",
        "withdrawing its records",
        "left",
    ]


@pytest.mark.slow  # conditions are tested one by one; here with processes
@pytest.mark.timeout(240)
def test_a_host_stops_while_a_program_of_the_list_runs_and_works_again_when_that_has_ended(
    swarm: ProcessSwarm, tmp_path: Path
) -> None:
    program, port = tmp_path / "kilohive-game", free_port()
    program.symlink_to(sys.executable)
    guest = host(swarm, "gamer", "--metrics-port", str(port), "--set", f'not_while = ["{program.name}"]')
    host(swarm, "neighbour")
    trainer = swarm.trainer("trainer-of-gamer", *TRAIN)
    wait_until(lambda: metric(port, "kilohive_calls_ok_total") > 0, "the host is called")
    assert metric(port, "kilohive_working") == 1

    with subprocess.Popen([program, "-ISc", "input()"], stdin=subprocess.PIPE) as game:
        assert guest.wait_for("paused", TIMEOUT_S)["reasons"] == ["kilohive-game runs"]
        calls, since_s = (
            metric(port, "kilohive_calls_ok_total"),
            guest.events("availability")[-1]["reasons"][0]["since_s"],
        )
        steps_on(trainer)
        assert metric(port, "kilohive_calls_ok_total") == calls, "nothing is answered"
        assert metric(port, "kilohive_working") == 0
        assert metric(port, "kilohive_paused_since_timestamp_seconds") == since_s
        assert tell("health", guest).splitlines()[1:] == [f"paused since {moment_text(since_s)}: kilohive-game runs"]
        status = swarm.status()
        assert "kilohive-game" not in str(status), "which program it is, is nobody else's business"
        told = peer(swarm, guest)
        assert (told["paused"], told["pause_cause"], told["n_blocks"]) == (True, "condition", 0)
        assert status["blocks_lost"] == []
        assert trainer.wait_for("paused_hosts")["total"] == 1
        game.communicate(b"\n", timeout=TIMEOUT_S)

    assert guest.wait_for("resumed", TIMEOUT_S)["blocks"] == N_BLOCKS
    wait_until(lambda: metric(port, "kilohive_calls_ok_total") > calls, "the host is called again")
    assert metric(port, "kilohive_working") == 1
    assert guest.events("availability")[-1]["reasons"] == []
    assert tell("health", guest).count("\n") == 1
    assert trainer.wait_for("paused_hosts", count=2)["total"] == 0
    assert trainer.stop() == 130


def test_a_pause_for_a_while_outlasts_a_restart_and_resume_ends_it_early(swarm: ProcessSwarm) -> None:
    guest = host(swarm, "weekender")
    said = tell("pause", guest, "2h")
    until_s = guest.events("asked")[-1]["until_s"]
    until = moment_text(until_s)
    assert said == f"paused until {until}, with its blocks stored in {guest.folder}\n"
    assert guest.stop() == 0
    swarm.nodes.remove(guest)

    guest = host(swarm, "weekender")
    assert guest.wait_for("paused", TIMEOUT_S, count=2)["reasons"] == ["its owner paused it"]
    (line,) = tell("health", guest).splitlines()[1:]
    assert line.endswith(f" until {until}: its owner paused it")
    told = peer(swarm, guest)
    assert (told["paused"], told["pause_cause"], told["paused_until_s"]) == (True, "owner", until_s)
    assert tell("resume", guest) == f"it works again, with {N_BLOCKS} blocks\n"


def test_a_pause_ends_by_itself_when_its_time_is_over(swarm: ProcessSwarm) -> None:
    guest = host(swarm, "napper")
    tell("pause", guest, "1s")
    assert guest.wait_for("resumed", TIMEOUT_S)["blocks"] == N_BLOCKS


@pytest.mark.slow  # half a minute of sleep
@pytest.mark.timeout(240)
def test_a_host_that_slept_fetches_its_blocks_before_it_serves_them(swarm: ProcessSwarm) -> None:
    guest, _ = host(swarm, "sleeper"), host(swarm, "awake")
    trainer = swarm.trainer("trainer-of-awake", *TRAIN)
    trainer.wait_for("step", TIMEOUT_S, count=5)
    os.kill(guest.child.pid, signal.SIGSTOP)
    try:
        peer_id = guest.events("announced")[-1]["peer_id"]
        wait_until(lambda: peer_id not in [one["peer_id"] for one in swarm.status()["peers"]], "it is forgotten")
        steps_on(trainer)
    finally:
        os.kill(guest.child.pid, signal.SIGCONT)
    assert guest.wait_for("paused", TIMEOUT_S)["reasons"] == ["the machine slept"]
    assert guest.wait_for("resumed", TIMEOUT_S)["blocks"] == N_BLOCKS
    woken = guest.events("joined")[-N_BLOCKS:]
    assert {event["source"] for event in woken} == {"replicas"}
    assert min(event["version"] for event in woken) > 0
    steps_on(trainer)
    assert trainer.stop() == 130
