"""When a forward counts as late: after the 95th percentile of the latest ones. Pure."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 200
MIN_SAMPLES = 20
QUANTILE = 0.95


class LatencyWindow:
    """The latest forwards' latencies in seconds. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """One more forward; one that was given up counts with the time that it was waited for.

        Without those the slowest would never be seen, and the percentile would sink until every call counted as late.
        """
        self._seconds.append(seconds)

    def late_after_s(self) -> float | None:
        """The 95th percentile, by nearest rank; None before MIN_SAMPLES."""
        if len(self._seconds) < MIN_SAMPLES:
            return None
        return sorted(self._seconds)[math.ceil(QUANTILE * len(self._seconds)) - 1]
