"""Several trainers under the supervisor of a local swarm: what they are told, and whose end is the swarm's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from common.errors import ConfigError
from coordinator.config import LocalConfig
from coordinator.local import check
from protocol.identity import Identity
from tests.support.local_swarm import pids, rows, run, run_to_the_end, running, told, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    return lambda behaviours: monkeypatch.setenv("KILOHIVE_FAKE", json.dumps(behaviours))


async def test_trainers_share_the_text_and_the_runs_tokens(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0", "trainer-1": "exit 0", "trainer-2": "exit 0"})
    assert await run_to_the_end(tmp_path, 6, trainers=3, steps=30) == 0
    trainers = [told(tmp_path, name) for name in ("trainer", "trainer-1", "trainer-2")]
    assert [flags["--shard"] for flags in trainers] == ["0", "1", "2"]
    assert {flags["--n-shards"] for flags in trainers} == {"3"}
    assert {flags["--steps"] for flags in trainers} == {"0"}
    folders = [tmp_path, tmp_path / "trainer-1", tmp_path / "trainer-2"]
    assert [flags["--out"] for flags in trainers] == list(map(str, folders))
    assert ["--plain" in flags for flags in trainers] == [False, True, True]
    assert told(tmp_path, "coordinator")["--total-tokens"] == str(30 * 8 * 2 * 128)
    words = json.loads((tmp_path / "coordinator.argv").read_text(encoding="utf-8"))
    named = words[words.index("--evaluators") + 1 :][:3]
    assert named == [Identity.load_or_create(folder / "identity.key").peer_id for folder in folders]
    assert "trainer-1 says something" in (tmp_path / "trainer-1" / "log.txt").read_text(encoding="utf-8")


async def test_a_single_trainer_counts_its_own_steps(tmp_path: Path, behave: Callable[[dict[str, str]], None]) -> None:
    behave({"trainer": "begin exit 0"})
    assert await run_to_the_end(tmp_path, 4, steps=30) == 0
    flags = told(tmp_path, "trainer")
    assert (flags["--steps"], flags["--shard"], flags["--n-shards"]) == ("30", "0", "1")


async def test_the_other_trainers_may_end_after_the_first(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0", "trainer-1": "later exit 0"})
    swarm = asyncio.create_task(run(tmp_path, trainers=2))
    await until(lambda: len(pids(tmp_path)) == 5, "all children")
    (tmp_path / "go").touch()
    await until(lambda: not running([pids(tmp_path)["trainer"]]), "the first trainer's end")
    assert len(running(pids(tmp_path).values())) == 4
    assert not swarm.done()
    (tmp_path / "later").touch()
    assert await swarm == 0
    assert rows(tmp_path, "ended") == []
    assert rows(tmp_path, "end")[0]["dead"] == {}


async def test_the_other_trainers_are_not_waited_for_without_end(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.local.TRAINERS_PATIENCE_S", 0.2)
    behave({"trainer": "begin exit 0"})
    assert await run_to_the_end(tmp_path, 5, trainers=2) == 0
    assert not running(pids(tmp_path).values())


async def test_stop_ends_the_wait_for_the_other_trainers(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "begin exit 0", "trainer-1": "stubborn"})
    stop = asyncio.Event()
    swarm = asyncio.create_task(run(tmp_path, stop, trainers=2))
    await until(lambda: len(pids(tmp_path)) == 6, "all children and a grandchild")
    (tmp_path / "go").touch()
    first = pids(tmp_path)["trainer"]
    await until(lambda: not psutil.pid_exists(first), "the first trainer's end to be noticed")
    stop.set()
    assert await swarm == 0  # the run's work is done
    assert rows(tmp_path, "end")[0]["killed"] == ["trainer-1"]


async def test_another_trainer_that_dies_is_an_event_and_training_goes_on(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], caplog: pytest.LogCaptureFixture
) -> None:
    behave({"trainer": "begin exit 0", "trainer-1": "exit 3", "trainer-2": "wait"})
    swarm = asyncio.create_task(run(tmp_path, trainers=3))
    await until(lambda: len(pids(tmp_path)) == 6 and rows(tmp_path, "ended") != [], "the event")
    os.kill(pids(tmp_path)["trainer-2"], signal.SIGKILL)
    await until(lambda: len(rows(tmp_path, "ended")) == 2, "the other event")
    assert not swarm.done()
    (tmp_path / "go").touch()
    assert await swarm == 0
    assert {(row["name"], row["exit_code"]) for row in rows(tmp_path, "ended")} == {("trainer-1", 3), ("trainer-2", -9)}
    assert "trainer-2 was killed by SIGKILL during the run" in caplog.text


async def test_a_mistake_that_ends_every_trainer_is_told_by_the_first(
    tmp_path: Path, behave: Callable[[dict[str, str]], None]
) -> None:
    behave({"trainer": "later exit 2", "trainer-1": "exit 2"})
    swarm = asyncio.create_task(run(tmp_path, trainers=2))
    await until(lambda: len(pids(tmp_path)) == 5 and rows(tmp_path, "ended") != [], "the other trainer's end")
    (tmp_path / "later").touch()
    assert await swarm == 2


async def test_all_trainers_go_on_in_a_resumed_run(
    tmp_path: Path, behave: Callable[[dict[str, str]], None], caplog: pytest.LogCaptureFixture
) -> None:
    behave({"trainer": "begin exit 0", "trainer-1": "exit 0"})
    assert await run_to_the_end(tmp_path, 5, trainers=2, steps=30) == 0
    assert "--steps" not in caplog.text
    assert await run_to_the_end(tmp_path, 5, trainers=2, steps=60, resume=True) == 0
    assert all("--resume" in told(tmp_path, name) for name in ("trainer", "trainer-1"))
    assert f"Trainers go on to the run's {30 * 8 * 2 * 128:,} tokens; --steps sets them only" in caplog.text
    with pytest.raises(ConfigError, match=r"--trainers 1: the run in .* has 2 trainers; go on with as many"):
        check(LocalConfig(out=tmp_path, hosts=2, resume=True))
