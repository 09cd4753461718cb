"""The terminal of a node is closed, or the reader of its output leaves: it leaves in order, or works on, and saves."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

from experiments.live.processes import RUN_NODE, events, wait_until
from node.host.block_store import block_path
from node.trainer.events import StoppedEvent
from protocol.manifest import BlockId
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.live.processes import ProcessSwarm

MANIFEST = small_manifest(
    model={"experts_per_layer": 8, "experts_per_token": 2, "d_model": 32, "expert_hidden": 16, "context": 32},
)
FLAGS = ("--batch", "4", "--eval-every", "0", "--set", "eval_bytes=2048", "--save-every", "1000000")
TIMEOUT_S = 60.0


def test_a_hangup_ends_each_role_as_sigterm_does_and_nothing_is_lost(swarm: ProcessSwarm, text: Path) -> None:
    host = swarm.host("host", "auto")
    trainer = swarm.trainer("trainer", "--data", str(text), "--steps", "100000", *FLAGS)
    trainer.wait_for("step", count=5)
    for node, code in ((trainer, 130), (host, 0), (swarm.coordinator, 0)):
        os.kill(node.child.pid, signal.SIGHUP)
        wait_until(node.child.ended, f"{node.folder.name} has left", 10)
        assert node.child.reap() == code, node.child.log_tail()
    assert trainer.told(StoppedEvent)
    assert (trainer.folder / "trunk.safetensors").exists()
    assert block_path(host.folder, BlockId(0, 0)).exists()
    assert host.events("leave")


def test_a_reader_that_leaves_costs_neither_the_training_nor_its_checkpoint(swarm: ProcessSwarm, text: Path) -> None:
    swarm.host("host", "auto")
    out = swarm.folder / "trainer"
    place = ("--join", str(swarm.swarm_file), "--out", str(out), "--data", str(text), "--plain")
    training = [sys.executable, RUN_NODE, "train", *place, "--steps", "40", *FLAGS]
    with subprocess.Popen(training, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        assert trainer.stderr is not None
        assert trainer.stdout.readline()
        trainer.stdout.close()
        errors = trainer.stderr.read()
    assert trainer.returncode == 0, errors
    assert b"Traceback" not in errors
    assert (out / "trunk.safetensors").exists()
    assert (out / "summary.json").exists()


def in_a_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A node with a terminal of its own, and the descriptor whose end closes that."""
    terminal, own = os.openpty()
    try:
        node = subprocess.Popen(
            [sys.executable, RUN_NODE, *arguments],
            stdin=own,
            stdout=own,
            stderr=own,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one call of the kernel's
        )
    finally:
        os.close(own)
    return node, terminal


def test_a_node_whose_terminal_is_closed_leaves_in_order(tmp_path: Path) -> None:
    node, terminal = in_a_terminal("coordinator", "--out", str(tmp_path))
    with node:
        wait_until((tmp_path / "swarm.toml").exists, "the coordinator is up")
        os.close(terminal)  # the kernel sends SIGHUP, and what is written from now on fails
        try:
            assert node.wait(TIMEOUT_S) == 0
        finally:
            node.kill()
    assert events(tmp_path / "coordinator" / "events.jsonl")[-1]["event"] == "leave"


def test_a_local_swarm_whose_terminal_is_closed_saves_and_leaves_nobody_behind(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    small = ("--hosts", "1", "--experts", "16", "--experts-per-block", "8", "--d-model", "32", "--heads", "2")
    flags = (*small, "--context", "32", "--batch", "4", "--steps", "100000", "--data", str(text))
    local, terminal = in_a_terminal("local", *flags, "--out", str(run))
    deadline = time.monotonic() + TIMEOUT_S
    with local:
        try:
            while not events(run / "events.jsonl", "step"):
                assert time.monotonic() < deadline
                os.read(terminal, 65_536)
            os.close(terminal)
            assert local.wait(TIMEOUT_S) == 130
        finally:
            local.terminate()
    assert (run / "trunk.safetensors").exists()
    assert block_path(run / "host-0", BlockId(0, 0)).exists()
