"""Recent figures of a host: tokens per second, staleness. Written by the runtime's thread, readable anywhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

RATE_HALF_LIFE_S = 10.0
RECENT = 100
"""Values over which a recent mean reaches back."""


class Rate:
    """Exponentially decaying amount per second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last, self._mass = clock, clock(), 0.0

    def add(self, amount: int) -> None:
        """Count `amount` as of now."""
        now = self._clock()
        self._mass = self._mass * math.exp2(-(now - self._last) / RATE_HALF_LIFE_S) + amount
        self._last = now

    def value(self) -> float:
        """Amount per second, lately."""
        decayed = self._mass * math.exp2(-(self._clock() - self._last) / RATE_HALF_LIFE_S)
        return decayed * math.log(2) / RATE_HALF_LIFE_S


class RecentMean:
    """Exponential mean over about the last `RECENT` values; the plain mean until there are as many."""

    def __init__(self) -> None:
        self._count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """Count one more value."""
        self._count = min(self._count + 1, RECENT)
        self.value += (value - self.value) / self._count
