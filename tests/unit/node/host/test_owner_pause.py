"""The owner's pause: until `resume` or a moment, and over a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from node.host.owner_pause import (
    MAX_PAUSE_S,
    OWNER_PAUSED,
    PAUSE_FILE,
    OwnerPause,
    WantedPause,
    read_pause,
    write_pause,
)
from node.limits.finding import Finding

if TYPE_CHECKING:
    from pathlib import Path

NOW_S = 1_800_000_000.0
HOUR_S = 3600.0


class Owner:
    """A host's owner, with a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s = folder, NOW_S
        self.pause = self.started()

    def started(self) -> OwnerPause:
        """The pause that a host which starts now finds."""
        return OwnerPause(self.folder, lambda: self.now_s)

    def says_pause(self, seconds: float | None = None) -> None:
        write_pause(self.folder, WantedPause(until_s=None if seconds is None else self.now_s + seconds))
        self.pause.begin()


def test_nothing_is_paused_before_the_owner_says_so(tmp_path: Path) -> None:
    pause = Owner(tmp_path).pause
    assert (pause.look(), pause.until_s) == (Finding(), None)


def test_a_pause_without_an_end_holds_until_resume(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.says_pause()
    owner.now_s += 2 * MAX_PAUSE_S
    assert (owner.pause.look(), owner.pause.until_s) == (OWNER_PAUSED, None)
    owner.pause.end()
    assert owner.pause.look() == Finding()


def test_a_pause_with_an_end_ends_by_itself_and_not_before(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.says_pause(HOUR_S)
    owner.now_s += HOUR_S - 1
    assert (owner.pause.look(), owner.pause.until_s) == (OWNER_PAUSED, NOW_S + HOUR_S)
    owner.now_s += 1
    assert (owner.pause.look(), owner.pause.until_s) == (Finding(), None)


def test_the_last_word_counts(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.says_pause(HOUR_S)
    owner.says_pause(2 * HOUR_S)
    assert owner.pause.until_s == NOW_S + 2 * HOUR_S
    owner.says_pause()
    assert owner.pause.until_s is None


@pytest.mark.parametrize("seconds", [None, HOUR_S])
def test_a_pause_is_kept_over_a_restart_and_resume_ends_it_for_the_next_one_too(
    seconds: float | None, tmp_path: Path
) -> None:
    owner = Owner(tmp_path)
    owner.says_pause(seconds)
    owner.now_s += 1
    owner.pause = owner.started()
    assert owner.pause.look() == OWNER_PAUSED
    assert owner.pause.until_s == (None if seconds is None else NOW_S + seconds)
    owner.pause.end()
    assert owner.started().look() == Finding()


def test_a_pause_that_ended_while_the_host_was_away_is_over(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.says_pause(HOUR_S)
    owner.now_s += 2 * HOUR_S
    assert owner.started().look() == Finding()


def test_a_bare_signal_pauses_until_resume_also_after_a_pause_that_is_over(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.says_pause(HOUR_S)
    owner.now_s += 2 * HOUR_S
    owner.pause.begin()
    assert (owner.pause.look(), owner.pause.until_s) == (OWNER_PAUSED, None)
    assert owner.started().look() == OWNER_PAUSED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}{}",
        '{"until_s": "soon"}',
        '{"until_s": true}',
        '{"until_s": NaN}',
        f'{{"until_s": {NOW_S + MAX_PAUSE_S + 1}}}',
        f'{{"until_s": {"9" * 1000}}}',
    ],
)
def test_a_file_that_makes_no_sense_pauses_nobody_and_is_named(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / PAUSE_FILE).write_text(text)
    assert read_pause(tmp_path, NOW_S) is None
    assert f"{tmp_path / PAUSE_FILE}: " in caplog.text


def test_a_disk_that_is_full_pauses_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    owner = Owner(tmp_path)
    monkeypatch.setattr("node.host.owner_pause.write_pause", full)
    owner.pause.begin()
    assert owner.pause.look() == OWNER_PAUSED
    assert "a restart ends this pause: No space left on device" in caplog.text
