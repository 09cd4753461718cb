"""A second process in a folder is refused before it has written anything there, whatever its role."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from common.command_line import arguments_for
from common.errors import ConfigError
from common.folders import LOCAL_LOCK, NODE_LOCK, SWARM_LOCK, FolderClaim, claimed
from coordinator.config import CoordinatorConfig, LocalConfig
from coordinator.coordinator import run_coordinator
from coordinator.lighthouse.config import LighthouseConfig
from coordinator.local import run_local
from node.contributor.command import run_contribute
from node.contributor.config import ContributeConfig
from node.host.command import run_host
from node.host.config import HostConfig
from node.trainer.config import TrainConfig
from node.trainer.trainer import run_trainer
from tests.integration.test_coordinator import PATIENCE_S, PROGRAM, coordinator

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

HOLDER = f"process {os.getpid()}: stop that one, or choose another"


def holding(folder: Path, lock: str, role: str) -> FolderClaim:
    return FolderClaim(folder=folder, role=role, flag="--held", lock=lock)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("role", "config", "lock", "words"),
    [
        (run_host, lambda folder: HostConfig(state=folder), NODE_LOCK, f"a `train`, {HOLDER} --state"),
        (run_trainer, lambda folder: TrainConfig(out=folder), NODE_LOCK, f"another `train`, {HOLDER} --out"),
        (run_coordinator, lambda folder: CoordinatorConfig(out=folder), SWARM_LOCK, f"a `train`, {HOLDER} --out"),
        (run_local, lambda folder: LocalConfig(out=folder), LOCAL_LOCK, f"a `train`, {HOLDER} --out"),
        (run_local, lambda folder: LocalConfig(out=folder), SWARM_LOCK, f"a `train`, {HOLDER} --out"),
        (
            run_contribute,
            lambda folder: ContributeConfig(file=folder / "e.safetensors", fetch=True),
            ".e.safetensors.lock",
            f"a `train`, {HOLDER} file",
        ),
    ],
    ids=["host", "train", "coordinator", "local", "local over a coordinator", "contribute"],
)
async def test_a_role_refuses_a_folder_that_another_process_has(
    tmp_path: Path,
    role: Callable[[Any, asyncio.Event], Awaitable[object]],
    config: Callable[[Path], Any],
    lock: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coordinator.local.LEAVE_PATIENCE_S", 0.2)
    with claimed(holding(tmp_path, lock, "train")):
        (tmp_path / "swarm.toml").write_text("of the first", encoding="utf-8")
        before = written(tmp_path)
        with pytest.raises(ConfigError, match=words) as refused:
            await role(config(tmp_path), asyncio.Event())
        added = {path.rpartition("/")[2] for path in written(tmp_path).keys() - before.keys()}
        assert {path: data for path, data in written(tmp_path).items() if path in before} == before
    assert refused.value.exit_code == 2
    assert added <= {LOCAL_LOCK}


@pytest.mark.parametrize("lock", [NODE_LOCK, SWARM_LOCK])
def test_a_lighthouse_refuses_the_folder_of_a_node_and_of_a_coordinator(tmp_path: Path, lock: str) -> None:
    pytest.importorskip("trio")
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBmwkXtQAy2bqbBrAA6XzaGhB8Vu6rSYqZ3yQ3Vdp8Zfn"
    swarm = {"run_id": "demo-0123456789ab", "initial_peers": (peer,)}
    flags = ["--state", str(tmp_path), *arguments_for(swarm, LighthouseConfig)]
    with claimed(holding(tmp_path, lock, "coordinator")):
        done = subprocess.run(
            [*PROGRAM, "lighthouse", *flags], capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    if "make setup-lighthouse" in done.stderr:
        pytest.skip("libp2p is not installed")
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path} is in use by a `coordinator`, {HOLDER} --state" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {NODE_LOCK, SWARM_LOCK}


def test_a_second_coordinator_changes_nothing_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with coordinator(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline()  # it says how to join once it has written everything, its first event too
        before = written(tmp_path)
        arguments = [*PROGRAM, "coordinator", "--out", str(tmp_path), "--stop-on-stdin-eof", "--log-level", "error"]
        second = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        assert second.returncode == 2
        assert second.stderr == (
            f"error: {tmp_path} is in use by another `coordinator`, process {first.pid}: stop that one, or choose "
            "another --out\n"
        )
        assert written(tmp_path) == before
        (p2pd,) = psutil.Process(first.pid).children()
        p2pd.send_signal(signal.SIGSTOP)  # it outlives the node that is killed
        try:
            first.kill()
            first.wait()
            with claimed(holding(tmp_path, SWARM_LOCK, "coordinator")):
                assert p2pd.is_running()
        finally:
            p2pd.kill()
            p2pd.wait()


def test_a_local_waits_for_the_nodes_of_one_that_was_killed(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from common.folders import *\n"
    hold += "claim = FolderClaim(folder=Path(sys.argv[1]), role='host', flag='--state')\n"
    hold += "with claimed(claim): print(flush=True); time.sleep(1)"
    folder = tmp_path / "host-0"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True) as leaving:
        assert leaving.stdout is not None
        leaving.stdout.readline()
        # A run that its owner has stopped already: it opens the folder, starts nobody, and is done.
        stop = asyncio.Event()
        stop.set()
        assert asyncio.run(run_local(LocalConfig(out=tmp_path, hosts=1), stop)) == 130
