"""A rate that holds on average: whoever has taken something rests until it is paid for.

Payment comes after the taking, so that anything of any size passes, and a message is never cut.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

CREDIT_S = 1.0
"""So much that was not taken may be taken later: little things need not wait for each other."""


class DebtBucket:
    """Of `per_s` a second, None for no limit; counts the `total` in either case. Thread-safe."""

    def __init__(self, per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._clock = per_s, clock
        self._lock = threading.Lock()
        self._paid_at_s = clock()
        self.total = 0.0

    def take(self, amount: float) -> float:
        """Take it; seconds until everything that was taken is paid for."""
        with self._lock:
            self.total += amount
            if self._per_s is None:
                return 0.0
            now_s = self._clock()
            self._paid_at_s = max(self._paid_at_s, now_s - CREDIT_S) + amount / self._per_s
            return max(0.0, self._paid_at_s - now_s)

    def wait_s(self) -> float:
        """Seconds until what was taken so far is paid for."""
        return self.take(0.0)
