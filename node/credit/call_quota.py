"""How many calls of the service `Credit` a node answers: so many of each caller in a minute, and a few at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_CALLS = 120
WINDOW_S = 60.0
MAX_CALLERS = 4096
"""Callers whose calls are counted; who called longest ago is forgotten first."""

MAX_AT_ONCE = 4
BUSY_RETRY_S = 1.0


class CallQuota:
    """Bounds the calls of each caller. It belongs to the event loop. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._running = 0

    @contextmanager
    def one_call(self, caller: str) -> Iterator[None]:
        """Count a call of `caller` while it is answered. Raises OverloadedError, with a delay, for one too many."""
        self._count(caller)
        if self._running >= MAX_AT_ONCE:
            raise OverloadedError(f"this node already answers {MAX_AT_ONCE} calls about receipts", BUSY_RETRY_S)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _count(self, caller: str) -> None:
        now_s = self._clock()
        began_s, n_calls = self._windows.pop(caller, (now_s, 0))
        if now_s - began_s >= WINDOW_S:
            began_s, n_calls = now_s, 0
        self._windows[caller] = (began_s, n_calls + 1)
        if len(self._windows) > MAX_CALLERS:
            self._windows.popitem(last=False)
        if n_calls >= MAX_CALLS:
            left_s = began_s + WINDOW_S - now_s
            raise OverloadedError(f"more than {MAX_CALLS} calls of one caller in {WINDOW_S:.0f} s", left_s)
