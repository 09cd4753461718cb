from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.events import EventLog

if TYPE_CHECKING:
    from common.events import Event

FULL = Path("/dev/full")


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_each_event_is_one_line_of_json_and_reaches_subscribers(tmp_path: Path) -> None:
    heard: list[Event] = []
    log = EventLog(tmp_path / "deep" / "events.jsonl", clock=lambda: 12.3456)
    log.subscribe(heard.append)
    log.emit("step", step=1, loss=0.5)
    log.close()
    log.emit("late")
    assert [json.loads(line) for line in lines(tmp_path / "deep" / "events.jsonl")] == [heard[0]]
    assert heard[0] == {"t": 12.346, "event": "step", "step": 1, "loss": 0.5}
    assert heard[1]["event"] == "late"


def test_a_reopened_log_goes_on_after_what_is_there(tmp_path: Path) -> None:
    for name in ("first", "second"):
        log = EventLog(tmp_path / "events.jsonl")
        log.emit(name)
        log.close()
    assert [json.loads(line)["event"] for line in lines(tmp_path / "events.jsonl")] == ["first", "second"]


def test_events_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    def emit_many() -> None:
        for _ in range(50):
            log.emit("x", pad="y" * 500)

    threads = [threading.Thread(target=emit_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [json.loads(line)["event"] for line in lines(tmp_path / "events.jsonl")] == ["x"] * 200


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full, a disk without room, is Linux's")
def test_a_full_disk_is_told_once_and_costs_no_more_than_the_lines(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []
    log = EventLog(FULL)
    log.subscribe(heard.append)
    for n in range(3):
        log.emit("step", step=n)
    log.close()
    assert [event["step"] for event in heard] == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "cannot write the event log /dev/full: No space left on device" in caplog.text


def test_a_log_with_a_limit_keeps_the_newest_lines_in_two_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 1.0, max_bytes=200)
    for step in range(40):
        log.emit("step", step=step)
    log.close()
    newest, before = tmp_path / "events.jsonl", tmp_path / "events.jsonl.previous"
    assert newest.stat().st_size < 200 <= before.stat().st_size < 250
    steps = [json.loads(line)["step"] for line in (*lines(before), *lines(newest))]
    assert steps == list(range(steps[0], 40))
