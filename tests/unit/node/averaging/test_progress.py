"""What is told of downloads that take their time."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.events import EventLog
from node.averaging.events import DownloadEvent
from node.averaging.progress import DownloadProgress
from tests.support.averaging_parts import BLOCK

if TYPE_CHECKING:
    import pytest

    from common.events import Event

MB = 1_000_000


class Watched:
    """A download's progress, by a clock that its test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events: list[Event] = []
        log = EventLog()
        log.subscribe(lambda event, t: self.events.append(event))
        self.progress = DownloadProgress(log, clock=lambda: self.now_s)

    def at(self, now_s: float, n_bytes: int, of_bytes: int = 25 * MB) -> None:
        self.now_s = now_s
        self.progress.tell(BLOCK, n_bytes, of_bytes)


def test_a_slow_download_tells_after_two_seconds_and_then_every_ten(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    with caplog.at_level(logging.INFO):
        for second in range(26):
            watched.at(float(second), (second + 1) * MB // 2)
    assert watched.events == [
        DownloadEvent(
            block="0/0",
            bytes=(second + 1) * MB // 2,
            of_bytes=25 * MB,
            bytes_per_s=MB // 2,
            seconds_left=round(50 - (second + 1), 1),
        )
        for second in (2, 12, 22)
    ]
    assert caplog.messages[0] == "Block 0/0: 1.5 of 25.0 MB are here, at 0.50 MB/s; 47 s left"
    assert len(caplog.messages) == 3


def test_a_quick_download_tells_nothing() -> None:
    watched = Watched()
    for n in range(1, 26):
        watched.at(n / 20, n * MB)
    watched.at(100.0, 5 * MB)
    assert watched.events == []


def test_a_download_that_goes_on_later_counts_its_rate_from_there() -> None:
    watched = Watched()
    watched.at(0.0, 10 * MB)
    watched.at(1.0, 11 * MB)
    watched.at(100.0, 11 * MB)  # the same piece again: it broke off
    watched.at(104.0, 15 * MB)
    (event,) = watched.events
    assert isinstance(event, DownloadEvent)
    assert (event.bytes_per_s, event.seconds_left) == (MB, 10.0)
