"""`pause`, `resume`, `leave`: which process is told, and what the command says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from common.errors import ConfigError, UnavailableError
from common.text import moment_text
from node.host.config import PauseConfig
from node.host.control import ask_host, read_process, run_leave, run_pause, run_resume
from node.host.owner_pause import read_pause
from node.rpc.health import server_told
from protocol.endpoints import Address
from protocol.identity import peer_id_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ADDRESS = Address(peer_id_of(bytes(range(32))), "127.0.0.1:4000")
HOST = """
import json, os, signal, sys
def rotate():
    for number in range(8, -1, -1):
        name = f"events.jsonl.{number}".removesuffix(".0")
        if os.path.exists(name):
            os.rename(name, f"events.jsonl.{number + 1}")
def tell(event, **fields):
    if sys.argv[1] == "rotates":
        rotate()
    with open("events.jsonl", "a") as log:
        log.write(json.dumps({"event": event, **fields}) + "\\n")
state = {"paused": False, "reasons": sys.argv[2:], "until_s": None}
if sys.argv[1] == "another":
    del state["paused"]
def pause(*_):
    with open("pause.json") as kept:
        state["until_s"] = json.load(kept)["until_s"]
    tell("asked", word="pause", **state)
    state["paused"] = True
    tell("paused", reasons=["its owner paused it"], stored=3)
def resume(*_):
    tell("asked", word="resume", **state | {"until_s": None})
    if not state["reasons"]:
        tell("resumed", blocks=3)
def leave(*_):
    tell("asked", word="leave", **state)
    tell("leaving", blocks=2)
    tell("handed_over", blocks=1, left=["0/1"])
    tell("leave")
    sys.exit(0)
answers = {signal.SIGUSR1: pause, signal.SIGUSR2: resume, signal.SIGQUIT: leave}
signal.pthread_sigmask(signal.SIG_BLOCK, answers)  # they wait: one that came just before a pause() would be lost
tell("old")
print("up", flush=True)
while True:
    answers[signal.sigwait(answers)]()
"""


class FakeHost:
    """A process that answers signals as a host does, and its folder."""

    def __init__(self, folder: Path, *reasons: str, version: str = "this") -> None:
        argv = (sys.executable, "-c", HOST, version, *reasons)
        self.popen = subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE)
        assert self.popen.stdout
        assert self.popen.stdout.readline() == b"up\n"
        self.config = PauseConfig(state=folder, timeout_s=10.0)
        told(folder, pid=self.popen.pid, started_s=psutil.Process(self.popen.pid).create_time())

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait(10)
        assert self.popen.stdout
        self.popen.stdout.close()


def told(folder: Path, **process: Any) -> None:
    (folder / "server.json").write_text(json.dumps({**ADDRESS._asdict(), **process}))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    running = FakeHost(tmp_path)
    yield running
    running.close()


async def test_pause_and_resume_wait_until_the_host_has_done_so(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, words in (
        (run_resume, "it works\n"),
        (run_pause, f"paused, with its blocks stored in {host.config.state}\n"),
        (run_pause, f"paused, with its blocks stored in {host.config.state}\n"),
        (run_resume, "it works again, with 3 blocks\n"),
    ):
        await command(host.config, asyncio.Event())
        assert capsys.readouterr().out == words


async def test_a_word_is_answered_with_what_the_host_heard_and_nobody_waits_until_it_is_done(host: FakeHost) -> None:
    heard = await ask_host(host.config, "pause", 60.0)
    assert (heard.word, heard.paused) == ("pause", False)
    assert heard.until_s is not None
    assert (await ask_host(host.config, "resume")).paused


async def test_a_word_that_nobody_hears_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no host runs from this folder"):
        await ask_host(PauseConfig(state=tmp_path), "leave")


@pytest.mark.parametrize(
    ("duration", "seconds"), [("90s", 90), ("1h", 3600), ("1h30m", 5400), ("2D", 172_800), ("30d", 2_592_000)]
)
async def test_a_pause_for_a_while_says_until_when(
    duration: str, seconds: int, host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    before_s = time.time()
    await run_pause(replace(host.config, duration=duration), asyncio.Event())
    kept = read_pause(host.config.state, time.time())
    assert kept is not None
    assert kept.until_s is not None
    assert before_s + seconds - 1 <= kept.until_s <= time.time() + seconds + 1
    stored = f"with its blocks stored in {host.config.state}"
    assert capsys.readouterr().out == f"paused until {moment_text(kept.until_s)}, {stored}\n"
    await run_pause(host.config, asyncio.Event())
    assert capsys.readouterr().out == f"paused, {stored}\n", "the last word counts"


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        ("soon", "pause: is 'soon', must be such as 30m, 2h or 1h30m"),
        ("1", "pause: is '1', must be such as 30m, 2h or 1h30m"),
        ("0m", "pause: is '0m', must be such as"),
        ("31d", "pause: 31d is longer than 30d; without a duration it lasts until `resume`"),
    ],
)
async def test_a_duration_that_cannot_be_kept_is_refused_before_anybody_is_told(
    duration: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        await run_pause(PauseConfig(state=tmp_path, duration=duration), asyncio.Event())
    assert read_pause(tmp_path, time.time()) is None


async def test_a_folder_that_cannot_be_written_is_a_sentence(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("node.host.control.write_pause", full)
    with pytest.raises(UnavailableError, match=r"pause\.json: cannot be written: No space left on device"):
        await run_pause(host.config, asyncio.Event())


async def test_resume_says_what_else_keeps_the_host_from_working(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost(tmp_path, "it is outside its schedule")
    try:
        await run_resume(host.config, asyncio.Event())
    finally:
        host.close()
    assert capsys.readouterr().out == "no longer paused by its owner, but it is outside its schedule\n"


async def test_leave_shows_its_progress_until_the_process_has_ended(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    await run_leave(host.config, asyncio.Event())
    assert capsys.readouterr().out.splitlines() == [
        "handing 2 blocks over",
        "others serve 1 of them; nobody has taken 0/1",
        "withdrawing its records",
        "left",
    ]
    with pytest.raises(UnavailableError, match=r"its host has ended|no host runs"):
        await run_pause(host.config, asyncio.Event())


async def test_a_host_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    host.popen.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UnavailableError, match=r"its host did not pause in 0.1 s"):
            await run_pause(PauseConfig(state=tmp_path, timeout_s=0.1), asyncio.Event())
    finally:
        host.close()


def test_a_folder_without_a_host_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no host runs from this folder"):
        read_process(tmp_path)


def test_a_number_that_another_process_has_by_now_gets_no_signal(tmp_path: Path) -> None:
    other = psutil.Process(os.getppid())
    told(tmp_path, pid=other.pid, started_s=other.create_time() - 3600)
    with pytest.raises(UnavailableError, match="its host has ended, or runs in a container"):
        read_process(tmp_path)


@pytest.mark.parametrize("process", [{}, {"pid": "1", "started_s": 1.0}, {"pid": -1, "started_s": 1.0}, {"pid": 1}])
def test_a_node_that_obeys_no_signals_gets_none(tmp_path: Path, process: dict[str, Any]) -> None:
    told(tmp_path, **process)
    with pytest.raises(ConfigError, match="is not of a host that can be told"):
        read_process(tmp_path)


def test_only_a_node_that_obeys_says_which_process_it_is(tmp_path: Path) -> None:
    with server_told(tmp_path, ADDRESS):
        assert json.loads((tmp_path / "server.json").read_text()) == ADDRESS._asdict()
    with server_told(tmp_path, ADDRESS, obeys=True):
        written = json.loads((tmp_path / "server.json").read_text())
    assert written["pid"] == os.getpid()
    assert written["started_s"] == psutil.Process().create_time()


async def test_an_answer_of_another_version_is_a_sentence(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, version="another")
    try:
        with pytest.raises(UnavailableError, match=r"events.jsonl: event 'asked', field 'paused': is missing; is its"):
            await run_pause(host.config, asyncio.Event())
    finally:
        host.close()


async def test_answers_are_heard_also_where_the_log_is_rotated_between_them(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, version="rotates")
    try:
        await run_pause(host.config, asyncio.Event())
        await run_resume(host.config, asyncio.Event())
        await run_leave(host.config, asyncio.Event())
    finally:
        host.close()
    assert (tmp_path / "events.jsonl.8").exists()
