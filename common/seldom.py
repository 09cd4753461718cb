"""Lines in a log that would come again and again: each is said once, and then not for a while."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MINUTE_S = 60.0


class Seldom:
    """Says of each of a few subjects at most every `every_s` seconds that it is due to be told."""

    def __init__(self, every_s: float = MINUTE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._next_s: dict[str, float] = {}

    def due(self, subject: str) -> bool:
        """Whether it is; the next time is `every_s` from now then."""
        now_s = self._clock()
        if now_s < self._next_s.get(subject, now_s):
            return False
        self._next_s[subject] = now_s + self._every_s
        return True
