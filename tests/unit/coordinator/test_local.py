"""The supervisor of a local swarm, over a fake program: it starts, watches and ends its children, and leaves none."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError, UnavailableError
from common.events import EventLog
from common.log_files import end_of_log
from coordinator.children import Child, ChildSpec, ProgressWatch, exit_words
from coordinator.config import LocalConfig, manifest_of
from coordinator.local import EXIT_INTERRUPTED, LocalSwarm, check, run_local
from tests.support.fake_swarm import STARTED
from tests.support.local_swarm import FAKE, ROOT, config_in, pids, rows, run, run_to_the_end, running, told, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    return lambda behaviours: monkeypatch.setenv("KILOHIVE_FAKE", json.dumps(behaviours))


@pytest.mark.parametrize("code", [0, 3])
async def test_the_trainers_exit_code_is_the_swarms(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], code: int
) -> None:
    behave({"trainer": f"begin exit {code}"})
    swarm = asyncio.create_task(run(tmp_path))
    await until(lambda: pids(tmp_path).keys() == {"coordinator", "host-0", "host-1", "trainer"}, "all children")
    (tmp_path / "go").touch()
    assert await swarm == code
    assert not running(pids(tmp_path).values())


def test_training_has_begun_once_the_trainers_log_says_so(tmp_path: Path) -> None:
    swarm, log = LocalSwarm(config_in(tmp_path), asyncio.Event(), ("unused",)), tmp_path / "events.jsonl"
    assert not swarm._training_began()
    log.write_text('{"t":0,"event":"waiting","for":"hosts"}\n{"t":0,"event":"sta', encoding="utf-8")
    assert not swarm._training_began()
    log.write_text(json.dumps({"t": 0, **STARTED.to_row()}) + "\n", encoding="utf-8")
    assert swarm._training_began()
    log.write_text('{"t":0,"event":"start","run_id":"a"}\n', encoding="utf-8")
    with pytest.raises(UnavailableError, match=r"events.jsonl: event 'start', field 'experts': is missing; is the"):
        swarm._training_began()


def test_training_has_begun_also_where_the_trainers_log_was_rotated_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t":0,"event":"waiting","for":"hosts"}\n' * 9, encoding="utf-8")
    swarm = LocalSwarm(config_in(tmp_path), asyncio.Event(), ("unused",))
    swarm._trainer_log_end = end_of_log(path)
    log = EventLog(path, max_bytes=400, n_files=3)
    log.emit(STARTED)
    assert path.stat().st_size < 400
    assert swarm._training_began()
    log.close()


async def test_each_host_is_told_its_own_blocks_and_together_they_have_all(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0"})
    swarm = asyncio.create_task(run(tmp_path))
    await until(lambda: len(pids(tmp_path)) == 4, "all children")
    (tmp_path / "go").touch()
    await swarm
    hosts = [told(tmp_path, f"host-{i}") for i in range(2)]
    assert [flags["--blocks"] for flags in hosts] == ["0/0-1,1/0-1", "0/2-3,1/2-3"]
    assert all("--stop-on-stdin-eof" in flags for flags in hosts)
    words = json.loads((tmp_path / "host-0.argv").read_text(encoding="utf-8"))
    assert "on_battery = true" in words, "on a laptop it works too"


async def test_its_nodes_are_told_how_to_read_and_how_long_logs_may_be(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0"})
    assert await run_to_the_end(tmp_path, 4, strict=True, event_log_mb=3.0) == 0
    for name in ("coordinator", "host-0", "trainer"):
        words = json.loads((tmp_path / f"{name}.argv").read_text(encoding="utf-8"))
        assert "event_log_mb = 3.0" in words
        assert ("--strict" in words) == (name == "trainer")


async def test_its_coordinator_is_told_of_the_snapshots(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0"})
    assert await run_to_the_end(tmp_path, 4, snapshot_every_s=600.0, keep_snapshots=5, snapshots="/models") == 0
    words = json.loads((tmp_path / "coordinator.argv").read_text(encoding="utf-8"))
    assert told(tmp_path, "coordinator")["--snapshot-every-s"] == "600.0"
    assert {"keep_snapshots = 5", 'snapshots = "/models"'} <= set(words)
    assert "--snapshot-every-s" not in told(tmp_path, "host-0")


async def test_replicas_of_a_block_go_to_different_hosts_also_when_the_run_is_resumed(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0"})
    wanted = ["0/0-1,1/0-1", "0/2-3,1/2-3", "0/0-1,1/0-1", "0/2-3,1/2-3"]
    assert await run_to_the_end(tmp_path, 6, hosts=4, replicas=2) == 0
    assert [told(tmp_path, f"host-{i}")["--blocks"] for i in range(4)] == wanted
    assert told(tmp_path, "coordinator")["--replicas"] == "2"
    assert await run_to_the_end(tmp_path, 6, hosts=4, resume=True) == 0
    assert [told(tmp_path, f"host-{i}")["--blocks"] for i in range(4)] == wanted
    assert "--replicas" not in told(tmp_path, "coordinator")  # the real one would refuse it: the run has two


async def test_stop_ends_all_within_three_seconds_even_those_that_ignore_sigterm(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "stubborn", "host-1": "stubborn"})
    stop = asyncio.Event()
    swarm = asyncio.create_task(run(tmp_path, stop))
    await until(lambda: len(pids(tmp_path)) == 6, "all children and two grandchildren")
    started = time.monotonic()
    stop.set()
    assert await swarm == EXIT_INTERRUPTED
    assert time.monotonic() - started < 3.0
    await until(lambda: not running(pids(tmp_path).values()), "the kernel to end what was killed")


async def test_stop_does_not_wait_once_all_have_left(tmp_path: Path, behave: Callable[[dict[str, str]], None]) -> None:
    behave({})
    stop = asyncio.Event()
    swarm = asyncio.create_task(run(tmp_path, stop))
    await until(lambda: len(pids(tmp_path)) == 4, "all children")
    started = time.monotonic()
    stop.set()
    assert await swarm == EXIT_INTERRUPTED
    assert time.monotonic() - started < 1.5


async def test_children_leave_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with supervisor_process(tmp_path):
        await until(lambda: len(pids(tmp_path)) == 4, "all children")
    children = pids(tmp_path)
    await until(lambda: not running(children.values()), "the children to leave")
    assert set(children) == {"coordinator", "host-0", "host-1", "trainer"}


@contextmanager
def supervisor_process(out: Path) -> Iterator[None]:
    """A supervisor in a process of its own; SIGKILL ends it."""
    code = (
        "import asyncio, sys; from pathlib import Path; from coordinator.local import LocalSwarm;"
        "from coordinator.config import LocalConfig;"
        "config = LocalConfig(out=Path(sys.argv[1]), hosts=2, experts=16, experts_per_block=2);"
        "asyncio.run(LocalSwarm(config, asyncio.Event(), tuple(sys.argv[2:])).run())"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(out), *FAKE], cwd=ROOT)
    try:
        yield
    finally:
        supervisor.kill()
        supervisor.wait()


async def test_a_host_that_dies_before_training_ends_the_swarm_with_its_last_words(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"host-1": "exit 2"})
    with pytest.raises(UnavailableError) as caught:
        await run(tmp_path)
    assert "host-1 ended with exit code 2 before training began" in str(caught.value)
    assert "host-1 says something before it ends" in str(caught.value)
    assert not running(pids(tmp_path).values())


async def test_a_host_that_dies_during_training_is_an_event_and_training_goes_on(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0"})
    swarm = asyncio.create_task(run(tmp_path))
    await until(lambda: (tmp_path / "events.jsonl").exists() and len(pids(tmp_path)) == 4, "training to begin")
    os.kill(pids(tmp_path)["host-0"], signal.SIGKILL)
    log = tmp_path / "local.jsonl"
    await until(lambda: '"event":"ended"' in log.read_text(encoding="utf-8"), "the event")
    assert not swarm.done()
    (tmp_path / "go").touch()
    assert await swarm == 0
    assert [(row["name"], row["exit_code"]) for row in rows(tmp_path, "ended")] == [("host-0", -9)]


async def test_when_no_host_is_left_the_swarm_ends(tmp_path: Path, behave: Callable[[dict[str, str]], None]) -> None:
    behave({"trainer": "begin wait"})
    swarm = asyncio.create_task(run(tmp_path))
    await until(lambda: (tmp_path / "events.jsonl").exists() and len(pids(tmp_path)) == 4, "training to begin")
    for name in ("host-0", "host-1"):
        os.kill(pids(tmp_path)[name], signal.SIGKILL)
    with pytest.raises(UnavailableError, match="was killed by SIGKILL so that no expert is left"):
        await swarm


async def test_a_coordinator_is_waited_for_as_long_as_it_says_something_and_its_words_are_passed_on(
    tmp_path: Path,
    behave: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("coordinator.local.STALLED_S", 1.5)
    monkeypatch.setattr("coordinator.local.LOG_EVERY_S", 0.0)
    monkeypatch.setattr("common.progress._Log.every_s", 0.0)
    behave({"coordinator": "slowly 20", "trainer": "begin exit 0"})
    with caplog.at_level(logging.INFO, "common.progress"):
        assert await run_to_the_end(tmp_path, n_children=4) == 0
    assert "the coordinator is opening the run: 7 GB of 20 GB read" in caplog.messages


async def test_a_coordinator_that_does_nothing_is_given_up(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.local.STALLED_S", 1.0)
    behave({"coordinator": "silent"})
    with pytest.raises(UnavailableError, match="has not opened the run, and has done nothing for 1 s; the end of its"):
        await run(tmp_path)
    assert not running(pids(tmp_path).values())


def test_a_child_that_computes_in_silence_gets_on_with_its_work(tmp_path: Path) -> None:
    words = (sys.executable, "-c", "while True: pass")
    computing = Child(ChildSpec(name="computing", argv=words, log=tmp_path / "log.txt"))
    waiting = Child(ChildSpec(name="waiting", argv=("/bin/sleep", "60"), log=tmp_path / "other.txt"))
    try:
        watches = [ProgressWatch(child, 1.0) for child in (computing, waiting)]
        deadline = time.monotonic() + 20
        while not watches[1].has_stalled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
            assert not watches[0].has_stalled()
    finally:
        for child in (computing, waiting):
            child.kill_tree()
            child.reap()


async def test_a_coordinator_that_fails_ends_the_swarm_with_its_last_words(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"coordinator": "exit 1"})
    with pytest.raises(UnavailableError, match=r"coordinator ended with exit code 1 before the run was open"):
        await run(tmp_path)
    assert pids(tmp_path).keys() == {"coordinator"}


async def test_a_trainer_that_is_killed_is_named(tmp_path: Path, behave: Callable[[dict[str, str]], None]) -> None:
    behave({"trainer": "begin wait"})
    swarm = asyncio.create_task(run(tmp_path))
    await until(lambda: "trainer" in pids(tmp_path), "the trainer")
    os.kill(pids(tmp_path)["trainer"], signal.SIGKILL)
    with pytest.raises(UnavailableError, match=r"the trainer was killed by SIGKILL; .* --resume goes on"):
        await swarm


async def test_a_folder_can_be_used_by_one_swarm_at_a_time(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    behave({})
    monkeypatch.setattr("coordinator.local.PROGRAM", FAKE)
    stop = asyncio.Event()
    first = asyncio.create_task(run_local(config_in(tmp_path), stop))
    await until((tmp_path / "local.lock").exists, "the lock")
    with pytest.raises(ConfigError, match="is in use by another `local`"):
        await run_local(config_in(tmp_path), asyncio.Event())
    stop.set()
    assert await first == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LocalConfig(hosts=0), "--hosts: must be 1 or more, is 0"),
        (LocalConfig(steps=-1), "--steps: must be 1 or more, is -1"),
        (LocalConfig(replicas=0), "--replicas: must be 1 or more, is 0"),
        (LocalConfig(replicas=5), "--replicas 5: there are only 4 hosts, and each holds a block once"),
        (LocalConfig(trainers=0), "--trainers: must be 1 or more, is 0"),
        (LocalConfig(averaging_period_s=0.0), "averaging.period_s: must be from 0.05 to 86400, is 0"),
        (LocalConfig(micro_batches=0), "--micro-batches: must be 1 or more"),
        (LocalConfig(eval_every=-5), "--eval-every: must be 0"),
        (LocalConfig(snapshot_every_s=-1.0), "snapshot_every_s: must be 0 or more, is -1"),
        (LocalConfig(keep_snapshots=0), "keep_snapshots: must be 1 or more, is 0"),
        (LocalConfig(hosts=33), "--hosts 33: there are only 32 blocks with --replicas 1"),
        (LocalConfig(experts=1023), "--experts 1023: must be a multiple of --layers 2"),
        (LocalConfig(heads=3), "model.d_model: must be a multiple of 2 \\* n_heads = 6"),
        (LocalConfig(gate="product_key"), "product keys need a square number"),
        (LocalConfig(name="a b"), "name: must be 1 to 48 letters"),
        (LocalConfig(resume=True), "holds no run to go on with"),
    ],
)
def test_a_mistake_is_found_before_a_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: LocalConfig, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        check(config)


def existing_run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    manifest = manifest_of(config_in(out), owner="", total_tokens=1000)
    (out / "manifest.toml").write_text(manifest.to_toml(), encoding="utf-8")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    existing_run(tmp_path)
    with pytest.raises(ConfigError, match="holds a run already: add --resume to go on"):
        check(config_in(tmp_path))


def test_a_resumed_run_may_train_longer_but_not_change_shape(tmp_path: Path) -> None:
    existing_run(tmp_path)
    check(LocalConfig(out=tmp_path, hosts=2, steps=10_000, resume=True))
    with pytest.raises(ConfigError, match=r"model\.experts_per_layer: is 16, but the run in .* has 8"):
        check(LocalConfig(out=tmp_path, hosts=2, experts=32, resume=True))


def test_a_resumed_run_needs_as_many_hosts_as_hold_its_state(tmp_path: Path) -> None:
    existing_run(tmp_path)
    for index in range(3):
        (tmp_path / f"host-{index}").mkdir()
    check(LocalConfig(out=tmp_path, hosts=3, resume=True))
    with pytest.raises(ConfigError, match="has 3 hosts; go on with as many"):
        check(LocalConfig(out=tmp_path, hosts=2, resume=True))


def test_how_a_process_ended_is_told_in_words() -> None:
    assert exit_words(1) == "ended with exit code 1"
    assert exit_words(-9) == "was killed by SIGKILL"
    assert exit_words(-250) == "was killed by signal 250"
