"""Time that does not jump when the system's clock is set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def clock_with_sleep() -> float:
    """Seconds that go on while the machine sleeps, and do not jump when its clock is set."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """Seconds since 1970 as the system's clock had them at the start, and as they went on since then.

    Called for the time. Records live for seconds, so a node whose clock is set must not take the new time unless its
    peers have it too: whoever can ask them decides, and calls `follow`.
    """

    def __init__(
        self, system: Callable[[], float] | None = None, elapsed: Callable[[], float] = clock_with_sleep
    ) -> None:
        self._system, self._elapsed = system or _system_time, elapsed
        self._base_s = 0.0
        self._says_system_until_s = 0.0
        self.follow()

    def __call__(self) -> float:
        """Return the time."""
        return self._base_s + self._elapsed()

    def ahead_s(self) -> float:
        """How far the system's clock is ahead of this one."""
        return self._system() - self()

    def follow(self) -> None:
        """Take the system's time from now on."""
        self._base_s = self._system() - self._elapsed()

    def say_system(self, seconds: float) -> None:
        """Tell peers the system's time for so long: where all of them were set at once, they see that they agree."""
        self._says_system_until_s = self._elapsed() + seconds

    def told(self) -> float:
        """Return the time to tell a peer who asks."""
        return self._system() if self._elapsed() < self._says_system_until_s else self()


def _system_time() -> float:
    """Look `time.time` up at each call."""
    return time.time()
