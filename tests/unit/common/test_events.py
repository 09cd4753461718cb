from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from common.config import EventLogConfig
from common.errors import InvalidInputError
from common.events import Event, EventLog, read_event
from common.log_files import LogReader, end_of_log, log_files

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = Path("/dev/full")


@dataclass(frozen=True, kw_only=True)
class Part:
    share: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stepped(Event):
    event: ClassVar[str] = "step"

    step: int
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Nested(Event):
    event: ClassVar[str] = "nested"

    for_: str
    parts: tuple[Part, ...]
    versions: dict[str, int]
    limits: dict[str, object]
    on: bool


NESTED = Nested(
    for_="x",
    parts=(Part(share=0.5), Part(share=1.0, names=("a", "b"))),
    versions={"0/1": 7},
    limits={"cpu_percent": 50.0, "schedule": "22-06"},
    on=True,
)
NESTED_LINE = (
    '{"t":12.346,"event":"nested","for":"x","parts":[{"share":0.5,"names":[]},{"share":1.0,"names":["a","b"]}],'
    '"versions":{"0/1":7},"limits":{"cpu_percent":50.0,"schedule":"22-06"},"on":true}'
)


def heard_by(heard: list[tuple[Event, float]]) -> Callable[[Event, float], None]:
    return lambda event, t_s: heard.append((event, t_s))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_each_event_is_one_line_of_json_and_reaches_subscribers(tmp_path: Path) -> None:
    heard: list[tuple[Event, float]] = []
    log = EventLog(tmp_path / "deep" / "events.jsonl", clock=lambda: 12.3456)
    log.subscribe(heard_by(heard))
    log.emit(Stepped(step=1, loss=0.5))
    log.close()
    log.emit(NESTED)
    (line,) = lines(tmp_path / "deep" / "events.jsonl")
    assert line == '{"t":12.346,"event":"step","step":1,"loss":0.5}'
    assert heard == [(Stepped(step=1, loss=0.5), 12.346), (NESTED, 12.346)]


def test_an_event_comes_back_from_its_line_as_it_was_emitted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 12.3456)
    log.emit(NESTED)
    log.close()
    (line,) = lines(tmp_path / "events.jsonl")
    assert line == NESTED_LINE
    assert read_event(line, Nested) == read_event(line.encode(), Stepped, Nested) == NESTED
    assert read_event(line, Stepped) is None


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert read_event('{"t":1,"event":"step","step":3,"loss":2,"new":[1]}', Stepped) == Stepped(step=3, loss=2.0)
    assert read_event('{"t":1,"event":"step","loss":null,"step":3}', Stepped) == Stepped(step=3)


def test_fields_that_an_older_version_did_not_have_take_their_defaults() -> None:
    assert read_event('{"t":1,"event":"step","step":3}', Stepped) == Stepped(step=3)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"event":"step"}', "event 'step', field 'step': is missing"),
        ('{"event":"step","step":1.5,"loss":1.0}', "event 'step', field 'step': must be of the type int"),
        ('{"event":"step","step":true,"loss":1.0}', "event 'step', field 'step': must be of the type int"),
        ('{"event":"step","step":1,"loss":"1"}', "event 'step', field 'loss': must be of the type float"),
        (NESTED_LINE.replace('"for"', '"for_"'), "event 'nested', field 'for': is missing"),
        (
            NESTED_LINE.replace("0.5", '"half"'),
            "event 'nested', field 'parts', field 'share': must be of",
        ),
        (NESTED_LINE.replace("[]", "{}"), "event 'nested', field 'parts', field 'names': must be of the type tuple"),
        (
            NESTED_LINE.replace('{"share":0.5,"names":[]}', "1"),
            "event 'nested', field 'parts': must be of the type",
        ),
        (NESTED_LINE.replace(":7}", ":null}"), "event 'nested', field 'versions': must be of the type int"),
        (NESTED_LINE.replace("true", "1"), "event 'nested', field 'on': must be of the type bool"),
    ],
)
def test_a_field_that_is_missing_or_ill_typed_is_named(line: str, problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_event(line, Stepped, Nested)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    "line", ["", "x", '{"event":"st', "[1]", "null", "{}", '{"event":["step"]}', b"\xff", b'{"a":"\xff"}']
)
def test_a_line_without_an_event_is_none(line: str | bytes) -> None:
    assert read_event(line, Stepped, Nested) is None


def test_a_reopened_log_goes_on_after_what_is_there(tmp_path: Path) -> None:
    for event in (Stepped(step=1), NESTED):
        log = EventLog(tmp_path / "events.jsonl")
        log.emit(event)
        log.close()
    assert [json.loads(line)["event"] for line in lines(tmp_path / "events.jsonl")] == ["step", "nested"]


def test_events_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    def emit_many() -> None:
        for _ in range(50):
            log.emit(replace(NESTED, for_="y" * 500))

    threads = [threading.Thread(target=emit_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [json.loads(line)["event"] for line in lines(tmp_path / "events.jsonl")] == ["nested"] * 200


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full, a disk without room, is Linux's")
def test_a_full_disk_is_told_once_and_costs_no_more_than_the_lines(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[Event, float]] = []
    log = EventLog(FULL)
    log.subscribe(heard_by(heard))
    for n in range(3):
        log.emit(Stepped(step=n))
    log.close()
    assert [event for event, _ in heard] == [Stepped(step=n) for n in range(3)]
    assert len(caplog.records) == 1
    assert "cannot write the event log /dev/full: No space left on device" in caplog.text


def test_a_log_with_a_limit_keeps_the_newest_lines_in_two_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 1.0, max_bytes=200, n_files=2)
    for step in range(40):
        log.emit(Stepped(step=step))
    log.close()
    newest, before = tmp_path / "events.jsonl", tmp_path / "events.jsonl.1"
    assert newest.stat().st_size < 200 <= before.stat().st_size < 250
    steps = [json.loads(line)["step"] for line in (*lines(before), *lines(newest))]
    assert steps == list(range(steps[0], 40))


def test_a_log_keeps_as_many_files_as_it_is_told_and_shows_each_before_it_goes(tmp_path: Path) -> None:
    path, gone = tmp_path / "events.jsonl", list[str]()
    (tmp_path / "events.jsonl.1.note").write_text("no file of the log", encoding="utf-8")
    (tmp_path / "events.jsonl.7").write_text("an older file, of when more were kept\n", encoding="utf-8")
    log = EventLog(path, lambda: 1.0, max_bytes=200, n_files=3, before_drop=lambda file: gone.extend(lines(file)))
    for step in range(60):
        log.emit(Stepped(step=step))
    log.close()
    assert [file.name for file in log_files(path)] == ["events.jsonl.2", "events.jsonl.1", "events.jsonl"]
    assert sum(file.stat().st_size for file in log_files(path)) < 3 * 250
    assert gone.pop(0) == "an older file, of when more were kept"
    kept = [line for file in log_files(path) for line in lines(file)]
    assert [json.loads(line)["step"] for line in (*gone, *kept)] == list(range(60))


def test_a_log_is_bounded_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    whole, default = EventLog(tmp_path / "whole.jsonl", max_bytes=0), EventLog(tmp_path / "default.jsonl")
    for log in (whole, default):
        for _ in range(6):
            log.emit(replace(NESTED, for_="y" * 11_000_000))
        log.close()
    assert [file.name for file in log_files(tmp_path / "whole.jsonl")] == ["whole.jsonl"]
    assert len(log_files(tmp_path / "default.jsonl")) == EventLogConfig().event_log_files == 5
    assert EventLogConfig().event_log_bytes == 10_000_000


def test_a_log_that_cannot_be_rotated_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    log = EventLog(tmp_path / "events.jsonl", lambda: 1.0, max_bytes=200, n_files=1, before_drop=fail)
    for step in range(8):
        log.emit(Stepped(step=step))
    log.close()
    assert len(lines(tmp_path / "events.jsonl")) == 8
    assert caplog.text.count("cannot be begun anew: No space left on device") == 1


def test_a_reader_misses_nothing_and_reads_nothing_twice_while_a_log_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, lambda: 1.0, max_bytes=200, n_files=4)
    for step in range(4):
        log.emit(Stepped(step=step))
    reader, read = LogReader(path, end_of_log(path)), list[int]()
    assert reader.new_lines() == []
    for step in range(4, 100):
        log.emit(Stepped(step=step))
        if step % 7 == 0:
            read += [json.loads(line)["step"] for found in iter(reader.new_lines, []) for line in found]
    log.close()
    assert read == list(range(4, 99))


def test_a_reader_of_a_log_that_is_not_there_yet_begins_with_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = LogReader(path, end_of_log(path))
    assert reader.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert reader.new_lines() == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n")
    assert reader.new_lines() == [b"two"]
    path.write_bytes(b"anew\n")
    assert reader.new_lines() == [b"anew"]
