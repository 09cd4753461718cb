"""Whether somebody else needs this machine: other programs that compute, or a person at one of its terminals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from node.limits.process_usage import ProcessUse

SAMPLE_S = 5.0
BUSY_SHARE = 0.25
"""The share of all processors, taken by others, from which a machine is busy. Programs of low priority (`nice`)
do not count."""

BUSY_SAMPLES = 2
"""Busy samples in a row that make a machine busy: a page that loads is no reason."""

INPUT_S = 180.0
"""A person who typed so lately is still there."""

IDLE_FOR_S = 60.0
"""Nobody must have needed the machine for so long before work begins again."""


class Sample(NamedTuple):
    """What others took of all processors since the last sample, 0 to 1, and seconds since somebody typed, if told."""

    others: float
    input_age_s: float | None


class IdleJudge:
    """Turns samples into a decision that does not flutter. It begins with a machine in use."""

    def __init__(self, now_s: float) -> None:
        self._busy_samples = 0
        self._needed_s = now_s
        self.in_use = True

    def hear(self, sample: Sample, now_s: float) -> bool:
        """Whether the machine is in use."""
        self._busy_samples = self._busy_samples + 1 if sample.others > BUSY_SHARE else 0
        typed = sample.input_age_s is not None and sample.input_age_s < INPUT_S
        if typed or self._busy_samples >= BUSY_SAMPLES:
            self._needed_s, self.in_use = now_s, True
        elif now_s - self._needed_s >= IDLE_FOR_S:
            self.in_use = False
        return self.in_use


class MachineUse:
    """Takes samples; the first is of the time since this was made."""

    def __init__(self, use: ProcessUse) -> None:
        self._use = use
        self._before = self._read()

    def sample(self) -> Sample:
        """Since the last one."""
        before, self._before = self._before, self._read()
        others_s, all_s = (now - then for now, then in zip(self._before, before, strict=True))
        return Sample(max(0.0, others_s) / max(all_s, 1e-3), input_age_s())

    def _read(self) -> tuple[float, float]:
        """Seconds of all processors that others have taken, and that there were."""
        times = psutil.cpu_times()
        free = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "nice", 0.0)
        # A virtual machine's guests are in `user` already.
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return whole - free - self._use.cpu_s(), whole


def input_age_s() -> float | None:
    """Seconds since somebody typed at a terminal of this machine; None where nobody is logged in or it is not told."""
    typed = []
    for user in psutil.users():
        try:
            typed.append((Path("/dev") / (user.terminal or "none")).stat().st_atime)
        except OSError:
            continue
    return time.time() - max(typed) if typed else None
