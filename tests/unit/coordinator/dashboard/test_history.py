"""What a run was like: bounded, coarser the longer ago, and still there after a restart."""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from common.errors import CheckpointError, ConfigError
from coordinator.dashboard import history as module
from coordinator.dashboard.history import (
    COLUMNS,
    DAY_S,
    HOUR_S,
    MAX_EVALUATIONS,
    MAX_POINTS,
    PAGE_BYTES,
    SPANS,
    TIERS,
    RunHistory,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RUN = "demo-0123456789ab"
T_S = 1_800_000_000
MB = 1 << 20


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., RunHistory]]:
    """Opens the history of a folder, again and again, and closes each in the end."""
    made: list[RunHistory] = []

    def open_it(run_id: str = RUN, max_bytes: int = 16 * MB) -> RunHistory:
        made.append(RunHistory(tmp_path / "history.sqlite", run_id, max_bytes))
        return made[-1]

    yield open_it
    for history in made:
        history.close()


def sample(**figures: float | None) -> dict[str, float | None]:
    return dict.fromkeys(COLUMNS) | figures


def fill(history: RunHistory) -> None:
    for number in range(1000):
        history.add(T_S + 10 * number, dict.fromkeys(COLUMNS, 0.1), [])


def n_rows(path: Path, step_s: int) -> int:
    database = sqlite3.connect(path)
    (count,) = database.execute("SELECT COUNT(*) FROM samples WHERE step_s = ?", (step_s,)).fetchone()
    database.close()
    return int(count)


def test_a_history_that_is_new_has_nothing_to_show(opened: Callable[..., RunHistory]) -> None:
    curves = opened().curves(HOUR_S, T_S)
    assert curves.t_s == ()
    assert set(curves.figures) == set(COLUMNS)
    assert opened().evaluations() == []


def test_samples_come_back_in_order_and_survive_a_restart(opened: Callable[..., RunHistory]) -> None:
    history = opened()
    for number in range(5):
        history.add(
            T_S + 10 * number, sample(hosts=number, tokens_per_s=100.0 * number), [(number * 100, 8.0 - number)]
        )
    history.close()
    again = opened()
    curves = again.curves(HOUR_S, T_S + 50)
    assert curves.t_s == tuple(T_S + 10 * number for number in range(5))
    assert curves.figures["hosts"] == (0, 1, 2, 3, 4)
    assert curves.figures["tokens_per_s"] == (0.0, 100.0, 200.0, 300.0, 400.0)
    assert curves.figures["staleness"] == (None,) * 5
    assert again.evaluations() == [(0, 8.0), (100, 7.0), (200, 6.0), (300, 5.0), (400, 4.0)]


def test_a_step_of_time_keeps_the_mean_of_rates_and_the_latest_count(opened: Callable[..., RunHistory]) -> None:
    history = opened()
    for second, hosts, speed in ((0, 4, 100.0), (3, None, None), (6, 2, 400.0)):
        history.add(T_S + second, sample(hosts=hosts, tokens_per_s=speed), [])
    (found,) = history.curves(HOUR_S, T_S + 10).figures["tokens_per_s"]
    assert found == pytest.approx(200.0)  # the second sample knew nothing, and counts as one
    assert history.curves(HOUR_S, T_S + 10).figures["hosts"] == (2,)


@pytest.mark.parametrize(("span", "step_s"), [("hour", 10), ("day", 60), ("week", 600), ("all", 600)])
def test_the_further_a_page_looks_back_the_coarser_it_sees(
    opened: Callable[..., RunHistory], span: str, step_s: int
) -> None:
    history = opened()
    for number in range(180):
        history.add(T_S + 10 * number, sample(run_tokens=number), [])
    times = history.curves(SPANS[span], T_S + 1800).t_s
    assert {later - earlier for earlier, later in pairwise(times)} == {step_s}


def test_rows_are_bounded_however_long_it_runs(
    opened: Callable[..., RunHistory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = (Tier(step_s=10, keep_s=100), Tier(step_s=60, keep_s=600), Tier(step_s=600, keep_s=6000))
    monkeypatch.setattr(module, "TIERS", tiers)
    history = opened()
    for number in range(2000):
        history.add(T_S + 10 * number, sample(hosts=number), [])
    for tier in tiers:
        assert n_rows(tmp_path / "history.sqlite", tier.step_s) <= tier.keep_s / tier.step_s + 1


def test_a_clock_that_was_set_back_leaves_no_rows_of_the_future(
    opened: Callable[..., RunHistory], tmp_path: Path
) -> None:
    history = opened()
    for t_s in (T_S + 30 * DAY_S, T_S, T_S + 10):
        history.add(t_s, sample(hosts=1), [])
    assert history.curves(HOUR_S, T_S + 10).t_s == (T_S, T_S + 10)
    assert n_rows(tmp_path / "history.sqlite", 10) == 2


def test_a_full_history_fits_its_file(opened: Callable[..., RunHistory], tmp_path: Path) -> None:
    history, full = opened(), dict.fromkeys(COLUMNS, 1234.5678)
    for number in range(1000):
        history.add(T_S + 600 * number, full, [(number * 1000, 4.0)])
    history.close()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    rows = sum(n_rows(tmp_path / "history.sqlite", tier.step_s) for tier in TIERS)
    most = sum(tier.keep_s // tier.step_s + 2 for tier in TIERS)
    assert size / rows * most < 8 * MB


def test_a_curve_has_no_more_points_than_a_page_can_show(opened: Callable[..., RunHistory]) -> None:
    history = opened()
    for number in range(1300):
        history.add(T_S + 60 * number, sample(tokens_per_s=number, calls_failed=number), [(number, 4.0)])
    curves = history.curves(DAY_S, T_S + 60 * 1300)
    assert MAX_POINTS / 2 < len(curves.t_s) <= MAX_POINTS
    assert curves.figures["calls_failed"][-1] == 1299
    assert sorted(curves.t_s) == list(curves.t_s)
    assert MAX_POINTS / 2 < len(history.evaluations()) <= MAX_POINTS
    assert history.evaluations()[-1] == (1299, 4.0)


def test_what_was_found_first_at_so_many_tokens_stays_and_evaluations_are_bounded(
    opened: Callable[..., RunHistory], tmp_path: Path
) -> None:
    history = opened()
    history.add(T_S, sample(), [(0, 8.0), (10, 7.0)])
    history.add(T_S, sample(), [(0, 7.5), (20, 6.0)])
    assert history.evaluations() == [(0, 8.0), (10, 7.0), (20, 6.0)]
    for number in range(0, 6000, 60):
        history.add(T_S, sample(), [(30 + number + at, 5.0) for at in range(60)])
    database = sqlite3.connect(tmp_path / "history.sqlite")
    (count,) = database.execute("SELECT COUNT(*) FROM evaluations").fetchone()
    database.close()
    assert MAX_EVALUATIONS / 2 <= count <= MAX_EVALUATIONS
    assert history.evaluations()[-1] == (6029, 5.0)


def test_a_file_that_may_not_grow_costs_the_newest_samples_and_is_one_sentence(
    opened: Callable[..., RunHistory], tmp_path: Path
) -> None:
    history = opened(max_bytes=12 * PAGE_BYTES)
    with pytest.raises(CheckpointError, match=r"history\.sqlite: cannot be written: database or disk is full"):
        fill(history)
    assert history.curves(HOUR_S, T_S + 1000).t_s
    history.close()
    assert (tmp_path / "history.sqlite").stat().st_size <= 12 * PAGE_BYTES


def test_another_runs_history_is_refused(opened: Callable[..., RunHistory]) -> None:
    opened()
    with pytest.raises(ConfigError, match=r"is the history of demo-0123456789ab, not of other-1; choose another --out"):
        opened("other-1")


@pytest.mark.parametrize("content", [b"no database at all, but a text that is long enough" * 20, b"SQLite format 3\0"])
def test_a_file_that_is_no_history_is_one_sentence(
    opened: Callable[..., RunHistory], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "history.sqlite").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no history of a run .*; move it away to begin anew"):
        opened()


def test_a_history_of_a_newer_version_is_refused(opened: Callable[..., RunHistory], tmp_path: Path) -> None:
    opened().close()
    database = sqlite3.connect(tmp_path / "history.sqlite")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ConfigError, match="is of format 9, this kilohive reads 1"):
        opened()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        RunHistory(tmp_path / "nowhere" / "history.sqlite", RUN, MB)
