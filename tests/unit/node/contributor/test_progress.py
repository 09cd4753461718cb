"""What a contributor's terminal shows, and what a log is told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from node.contributor.progress import steps_shown, words_shown

if TYPE_CHECKING:
    import pytest


def test_a_terminal_gets_a_bar_with_the_loss_and_a_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with steps_shown(4) as tell_step:
        tell_step(1, 2.0)
        tell_step(2, 1.5)
    with words_shown("looking for evaluators") as tell:
        tell("[red]as a peer may say[/red]")
    seen = capsys.readouterr()
    assert "train 1.500 nats/token" in seen.err
    assert "50%" in seen.err
    assert "[red]as a peer may say[/red]" in seen.err
    assert not seen.out


def test_a_log_gets_a_line_from_time_to_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now_s = 100.0
    monkeypatch.setattr("common.progress.time.monotonic", lambda: now_s)
    with caplog.at_level(logging.INFO), steps_shown(1000) as tell:
        for done in range(1, 7):
            tell(done, 2.0)
            now_s += 2.0
    assert caplog.messages == ["step 1/1,000, train 2.000 nats/token", "step 4/1,000, train 2.000 nats/token"]
