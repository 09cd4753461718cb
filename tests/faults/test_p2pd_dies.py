"""`kill -9` of p2pd under a host, a trainer and the coordinator: it comes back, and the swarm goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from dht.record_versions import TTL_S
from experiments.live.processes import ProcessSwarm, process_swarm, wait_until
from protocol.swarm_file import SwarmFile
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from experiments.live.processes import Node

MANIFEST = small_manifest(
    model={"experts_per_layer": 16, "experts_per_token": 4, "d_model": 32, "expert_hidden": 16, "context": 32},
    optimizer={"lr": 5e-3, "expert_lr": 5e-3, "total_tokens": 10_000_000, "warmup_tokens": 500},
)
ALL_BLOCKS = "0/0-3,1/0-3"
BACK_WITHIN_S = 10.0

pytestmark = pytest.mark.leaks_checked_per_module


@dataclass(frozen=True)
class Training:
    """A swarm with a host, and a trainer that trains until it is stopped."""

    swarm: ProcessSwarm
    host: Node
    trainer: Node


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[Training]:
    with process_swarm(tmp_path_factory.mktemp("swarm"), MANIFEST) as started:
        host = started.host("host", ALL_BLOCKS)
        flags = ("--steps", "100000", "--batch", "4", "--eval-every", "0", "--set", "eval_bytes=2048")
        trainer = started.trainer("trainer", "--data", str(text), *flags)
        trainer.wait_for("step", count=3)
        yield Training(started, host, trainer)


def p2pds_of(node: Node) -> list[psutil.Process]:
    """None while the old one is gone and the new one has not begun; one that goes meanwhile is none."""
    found = []
    for child in psutil.Process(node.child.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] * (child.name() == "p2pd")
    return found


def p2pd_of(node: Node) -> psutil.Process:
    (daemon,) = p2pds_of(node)
    return daemon


def socket_folder(daemon: psutil.Process) -> Path:
    return next(Path(part.removeprefix("-id=")).parent for part in daemon.cmdline() if part.startswith("-id="))


def listening_port(daemon: psutil.Process) -> int:
    return min(c.laddr.port for c in daemon.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN)


def kill_p2pd(node: Node) -> None:
    """Kill it; returns when another has taken its place with the same port."""
    daemon = p2pd_of(node)
    port, folder = listening_port(daemon), socket_folder(daemon)
    os.kill(daemon.pid, signal.SIGKILL)
    began_s = time.monotonic()
    wait_until(lambda: listens_again(node, daemon.pid), "another p2pd listens", BACK_WITHIN_S)
    assert listening_port(p2pd_of(node)) == port
    assert time.monotonic() - began_s < BACK_WITHIN_S
    wait_until(lambda: not folder.exists(), "the old sockets are gone", 5.0)


def listens_again(node: Node, old_pid: int) -> bool:
    for child in p2pds_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid != old_pid and any(c.status == psutil.CONN_LISTEN for c in child.net_connections(kind="tcp")):
                return True
    return False


def steps_go_on(training: Training, n: int = 5) -> None:
    training.trainer.wait_for("step", timeout_s=BACK_WITHIN_S, count=len(training.trainer.events("step")) + n)


def everybody_is_announced(swarm: ProcessSwarm, killed_s: float) -> None:
    """A reader from outside, who joins through the coordinator, sees the records made after the kill."""

    def fresh() -> bool:
        status = swarm.status()
        peers = {peer["role"]: peer for peer in status["peers"]}
        replicas = [replica for replica in status["replicas"] if replica["expiration_s"] > killed_s + TTL_S]
        return peers.keys() >= {"host", "trainer", "coordinator"} and len(replicas) == status["blocks"]

    wait_until(fresh, f"fresh records; status: {json.dumps(swarm.status())[-600:]}", BACK_WITHIN_S)


@pytest.mark.parametrize("victim", ["host", "trainer", "coordinator"])
def test_p2pd_comes_back_at_the_same_place_and_the_swarm_goes_on(training: Training, victim: str) -> None:
    node = {"host": training.host, "trainer": training.trainer, "coordinator": training.swarm.coordinator}[victim]
    killed_s = time.time()
    kill_p2pd(node)
    steps_go_on(training)
    everybody_is_announced(training.swarm, killed_s)
    assert not node.child.ended()
    log = (node.folder / "log.txt").read_text()
    assert log.count("p2pd has ended with exit code -9; it is started again") == 1
    assert "Traceback" not in log


def test_a_new_host_joins_afterwards_and_whoever_stops_leaves_no_file(training: Training) -> None:
    swarm = training.swarm
    (address,) = SwarmFile.read(swarm.swarm_file).initial_peers
    assert f"/tcp/{listening_port(p2pd_of(swarm.coordinator))}/" in address  # the peer id in it is checked by who joins
    late = swarm.host("late", "0/0")
    late.wait_for("announced")
    nodes = (late, training.trainer, training.host, swarm.coordinator)
    folders = [socket_folder(p2pd_of(node)) for node in nodes]
    kept = [folder.exists() for folder in folders]
    assert [node.stop() for node in nodes] == [0, 130, 0, 0]
    assert kept == [True] * len(nodes)
    assert not any(folder.exists() for folder in folders)
