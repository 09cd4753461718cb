"""The report is drawn from the event log, so that a resumed run shows all of its curve."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.events import EventLog
from common.log_files import log_files
from node.trainer.view import report as report_module
from node.trainer.view.report import (
    MAX_POINTS,
    Curve,
    Point,
    centred_mean,
    keep_curve,
    plot_loss,
    print_end,
    read_curve,
    report_files,
    thinned,
    write_report,
)
from tests.support.events import as_written
from tests.support.trainer_events import done, evaluation, start, step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

    from common.events import Event
    from node.trainer.events import DoneEvent

PNG = b"\x89PNG\r\n\x1a\n"

DONE = done(steps=3, tokens=12_288, calls_failed=0, train_s=160.0, sample="Text.", attribution="Wikipedia")


def write_events(path: Path, events: Sequence[Event]) -> Path:
    path.write_text("".join(json.dumps(as_written(event)) + "\n" for event in events), encoding="utf-8")
    return path


def test_the_curve_is_read_from_the_event_log(tmp_path: Path) -> None:
    rows = [start(), evaluation(0, 8.0), step(1, bits_per_byte=7.5), step(2, bits_per_byte=7.0), evaluation(2, 6.9)]
    curve = read_curve(write_events(tmp_path / "events.jsonl", rows))
    assert [(p.step, p.tokens, p.bits_per_byte) for p in curve.train] == [(1, 4096, 7.5), (2, 8192, 7.0)]
    assert [(p.step, p.bits_per_byte) for p in curve.held_out] == [(0, 8.0), (2, 6.9)]


def test_steps_taken_again_after_a_resume_count_once_as_taken_last(tmp_path: Path) -> None:
    first = [step(i, bits_per_byte=9.0) for i in range(1, 8)] + [evaluation(5, 9.0)]
    again = [step(i, bits_per_byte=5.0) for i in range(5, 10)] + [evaluation(5, 5.0)]
    curve = read_curve(write_events(tmp_path / "events.jsonl", [*first, start(step=4), *again]))
    assert [p.step for p in curve.train] == list(range(1, 10))
    assert [p.bits_per_byte for p in curve.train] == [9.0] * 4 + [5.0] * 5
    assert [p.bits_per_byte for p in curve.held_out] == [5.0]


def test_lines_that_a_crash_cut_short_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    good = json.dumps(as_written(step(2)))
    path.write_bytes(b'{"t":1,"event":"st\n[1]\n\xff\n{"event":"step"}\n' + good.encode() + b'\n{"event":"ev')
    assert [p.step for p in read_curve(path).train] == [2]


def test_the_curve_outlives_the_files_of_its_log(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, max_bytes=40_000, n_files=2, before_drop=partial(keep_curve, path))
    for number in range(1, 1001):
        log.emit(step(number, bits_per_byte=8.0 - number / 200))
        if number % 100 == 0:
            log.emit(evaluation(number, 5.0))
    log.close()
    assert sum(file.stat().st_size for file in log_files(path)) < 100_000
    curve = read_curve(path)
    assert [point.step for point in curve.train] == list(range(1, 1001))
    assert curve.train[0].bits_per_byte == 7.995
    assert [point.step for point in curve.held_out] == list(range(100, 1001, 100))


def test_what_is_kept_of_a_long_curve_is_bounded_and_spread_over_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "KEPT_POINTS", 50)
    path = tmp_path / "events.jsonl"
    for first in range(1, 1001, 100):
        going = write_events(tmp_path / "going", [step(number) for number in range(first, first + 100)])
        keep_curve(path, going)
    points = read_curve(path).train
    assert len(points) <= 50
    assert points[-1].step == 1000
    assert all(later.step - earlier.step <= 60 for earlier, later in pairwise(points))


def test_a_kept_curve_that_is_damaged_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "curve.json").write_text('{"train": [[1, 2]]}', encoding="utf-8")
    assert [p.step for p in read_curve(write_events(tmp_path / "events.jsonl", [step(5)])).train] == [5]
    assert "The curve of earlier steps in" in caplog.text


def test_write_report_leaves_a_summary_and_a_picture(tmp_path: Path) -> None:
    write_events(tmp_path / "events.jsonl", [evaluation(0, 8.0), step(1), step(2), evaluation(2, 3.05)])
    told = replace(DONE, files=tuple(map(str, report_files(tmp_path))))
    write_report(tmp_path, told)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {"t": 0.0, "event": "done", **summary} == as_written(told)
    assert list(summary)[:4] == ["run_id", "experts", "hosts", "trainers"]
    assert summary["bits_per_byte_end"] == 3.05
    assert summary["train_s"] == 160.0
    assert summary["attribution"] == "Wikipedia"
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "loss.png", "summary.json"]


def test_a_run_without_a_single_step_still_has_a_picture(tmp_path: Path) -> None:
    plot_loss(Curve(train=(), held_out=()), tmp_path / "loss.png", "empty")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_more_points_than_pixels_are_averaged() -> None:
    points = [Point(step=i, tokens=10 * i, bits_per_byte=float(i % 2)) for i in range(1, 10_001)]
    few = thinned(points, MAX_POINTS)
    assert len(few) == MAX_POINTS
    assert few[-1].tokens == 100_000
    assert {round(point.bits_per_byte, 1) for point in few} == {0.4, 0.6}


@given(st.integers(0, 50), st.integers(1, 20))
def test_thinning_keeps_the_last_point_and_the_limit(n: int, limit: int) -> None:
    few = thinned([Point(step=i, tokens=i, bits_per_byte=1.0) for i in range(n)], limit)
    assert len(few) <= limit
    assert not n or few[-1].step == n - 1


def test_the_smoothed_line_does_not_lag() -> None:
    falling = [100.0 - i for i in range(100)]
    smooth = centred_mean(falling, 10)
    assert all(math.isclose(a, b) for a, b in zip(smooth[5:-5], falling[5:-5], strict=True))
    assert centred_mean([], 10) == []


def panel(event: DoneEvent, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        print_end(console, event)
    return capture.get()


def test_the_last_panel_says_how_it_went_and_where_the_files_are() -> None:
    for width in (80, 120):
        text = panel(done(), width)
        for words in (
            "demo-0123456789ab",
            "8.010 → 3.050 bits/byte",
            "400 steps, 1,638,400 tokens in 2:51",
            "5,123 tokens/s",
            "1,024 experts on 4 hosts, 2 calls failed",
            "The city of the ·[31mnorth",
            "Wikipedia, CC BY-SA 4.0",
        ):
            assert words in text, words
        assert max(map(len, text.splitlines())) <= width
        assert text.splitlines()[-len(done().files) :] == list(done().files)


def test_the_last_panel_tells_the_loss_of_tokens_that_are_no_bytes() -> None:
    assert "nats/token" not in panel(done(), 80)
    assert "22.208 → 8.456 nats/token" in panel(done(bytes_per_token=4.0), 80)


def test_a_path_is_in_one_piece_however_narrow_the_terminal() -> None:
    path = f"/{'long/' * 30}loss.png"
    assert panel(done(files=(path,)), 60).splitlines()[-1] == path


def test_drawing_uses_no_global_state_of_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    plot_loss(Curve(train=(), held_out=()), tmp_path / "loss.png", "no pyplot")
    assert (tmp_path / "loss.png").exists()
