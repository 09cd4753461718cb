"""Whether somebody else needs this machine: other programs that compute, or a person at a screen or a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from node.limits.finding import Finding
from node.limits.sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.limits.process_usage import ProcessUse

SAMPLE_S = 5.0
MIN_SAMPLE_S = 1.0
"""The processors' clocks tick a hundred times a second: a shorter sample says little."""

BUSY_SHARE = 0.25
"""The share of all processors, taken by others, from which a machine is busy. Programs of low priority (`nice`)
do not count."""

BUSY_SAMPLES = 2
"""Busy samples in a row that make a machine busy: a page that loads is no reason."""

INPUT_S = 180.0
"""A person who typed at a terminal so lately is still there."""

IDLE_FOR_S = 60.0
"""Nobody must have needed the machine for so long before work begins again."""

NOT_WATCHED = Finding("its processors have not been watched for a minute yet")
BUSY = Finding("other programs need its processors")
TYPING = Finding("somebody types at a terminal of the machine")


class Processors:
    """Looks at what others took of all processors since the last look. The machine counts as busy until the second."""

    def __init__(
        self,
        use: ProcessUse,
        read: Callable[[ProcessUse], tuple[float, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._use, self._read, self._clock = use, read or others_and_all_s, clock
        self._before, self._before_s = self._read(use), clock()
        self._busy_samples = 0
        self._finding = NOT_WATCHED

    def look(self) -> Finding:
        """Take a sample, unless the last one was a moment ago."""
        now_s = self._clock()
        if now_s - self._before_s < MIN_SAMPLE_S:
            return self._finding
        before, self._before, self._before_s = self._before, self._read(self._use), now_s
        others_s, all_s = (now - then for now, then in zip(self._before, before, strict=True))
        busy = others_s > BUSY_SHARE * max(all_s, 1e-3)
        self._busy_samples = self._busy_samples + 1 if busy else 0
        self._finding = BUSY if self._busy_samples >= BUSY_SAMPLES else Finding()
        return self._finding


def others_and_all_s(use: ProcessUse) -> tuple[float, float]:
    """Seconds of all processors that others have taken, and that there were, since the machine started."""
    times = psutil.cpu_times()
    free = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "nice", 0.0)
    # A virtual machine's guests are in `user` already.
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return whole - free - use.cpu_s(), whole


class Person:
    """Looks whether somebody uses this machine: has typed at a terminal lately, or is at a screen."""

    def __init__(self, sessions: Sessions | None = None, input_age_s: Callable[[], float | None] | None = None) -> None:
        self._sessions, self._input_age_s = sessions or Sessions(INPUT_S), input_age_s or terminal_input_age_s

    def look(self) -> Finding:
        """Look at the terminals, and ask about the screens if these are silent."""
        age_s = self._input_age_s()
        return TYPING if age_s is not None and age_s < INPUT_S else self._sessions.look()


def terminal_input_age_s() -> float | None:
    """Seconds since somebody typed at a terminal of this machine; None where nobody is logged in or it is not told."""
    typed = []
    for user in psutil.users():
        try:
            typed.append((Path("/dev") / (user.terminal or "none")).stat().st_atime)
        except OSError:
            continue
    return time.time() - max(typed) if typed else None
