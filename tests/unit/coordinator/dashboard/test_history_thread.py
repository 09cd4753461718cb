"""A history on a thread of its own: what is slow or full there is told, and holds nobody up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from common.errors import CheckpointError, ConfigError, UnavailableError
from coordinator.dashboard import history_thread
from coordinator.dashboard.history import COLUMNS, FILE, RunHistory
from coordinator.dashboard.history_thread import HistoryThread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RUN, T_S, MB = "demo-0123456789ab", 1_800_000_000, 1 << 20
SAMPLE: dict[str, float | None] = dict.fromkeys(COLUMNS, 1.0)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until this is set."""
    go_on, add = threading.Event(), RunHistory.add

    def add_later(
        self: RunHistory, t_s: float, sample: Mapping[str, float | None], evaluations: Sequence[tuple[int, float]]
    ) -> None:
        assert go_on.wait(20)
        add(self, t_s, sample, evaluations)

    monkeypatch.setattr(RunHistory, "add", add_later)
    return go_on


async def test_what_was_added_is_read_and_is_there_again_after_a_restart(tmp_path: Path) -> None:
    for number in (0, 1):
        history = await HistoryThread.open(tmp_path / FILE, RUN, MB)
        history.add(T_S + 10 * number, SAMPLE, [(number, 5.0)])
        curves = await history.curves("hour", T_S + 20)
        assert curves.t_s == (T_S, T_S + 10)[: number + 1]
        await history.close()
    history = await HistoryThread.open(tmp_path / FILE, RUN, MB)
    assert await history.evaluations() == [(0, 5.0), (1, 5.0)]
    await history.close()


async def test_a_sample_is_left_out_while_the_one_before_is_written(tmp_path: Path, held: threading.Event) -> None:
    history = await HistoryThread.open(tmp_path / FILE, RUN, MB)
    for number in range(100):
        history.add(T_S + 10 * number, SAMPLE, [])
    held.set()
    assert (await history.curves("hour", T_S + 1000)).t_s == (T_S,)
    await history.close()


async def test_a_disk_that_does_not_answer_is_told_and_not_waited_for(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_thread, "READ_S", 0.02)
    monkeypatch.setattr(history_thread, "CLOSE_S", 0.02)
    history = await HistoryThread.open(tmp_path / FILE, RUN, MB)
    history.add(T_S, SAMPLE, [])
    with pytest.raises(UnavailableError, match="the history was not read within"):
        await history.curves("hour", T_S)
    await history.close()
    held.set()
    history._executor.shutdown()


async def test_what_cannot_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problems = ["the disk is full", "the disk is full", "", "the disk is full"]
    coming = iter(problems)

    def add(*_: object) -> None:
        if problem := next(coming):
            raise CheckpointError(problem)

    monkeypatch.setattr(RunHistory, "add", add)
    history = await HistoryThread.open(tmp_path / FILE, RUN, MB)
    for _ in problems:
        history.add(T_S, SAMPLE, [])
        await history.evaluations()  # after it, in the same thread
    await history.close()
    assert caplog.text.count("the disk is full; the page goes on without keeping what it shows") == 2


async def test_a_file_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="is no history of a run"):
        await HistoryThread.open(tmp_path / FILE, RUN, MB)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("history")]
