"""How long to rest after something was sent, received or computed, so that the owner's limits hold on average.

Everything is counted, with a limit or without. Thread-safe.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from node.limits.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.limits.process_usage import ProcessUse

OVERHEAD = 1.04
"""The factor on what is sent for TCP's and IP's headers, TLS's records and HTTP/2's frames."""

CALL_BYTES = 600
"""Headers of a call or of its answer: names, deadline, signature."""


class RateLimits:
    """What a node may send, receive and compute. `use` measures the computing; without it none is counted."""

    def __init__(
        self,
        limits: Limits | None = None,
        use: ProcessUse | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or Limits()
        self._use = use
        self._up, self._down = TokenBucket(limits.up_bytes_per_s, clock), TokenBucket(limits.down_bytes_per_s, clock)
        self._cpu = TokenBucket(_cores(limits), clock)
        self._counting = threading.Lock()
        self._counted_cpu_s = use.cpu_s() if use else 0.0
        self._counted_io = use.child_io() if use else None

    def follow(self, limits: Limits) -> None:
        """Keep these limits from now on."""
        self._up.refill_at(limits.up_bytes_per_s)
        self._down.refill_at(limits.down_bytes_per_s)
        self._cpu.refill_at(_cores(limits))

    @property
    def slows_downloads(self) -> bool:
        """Whether a download has to rest now and then."""
        return self._down.per_s is not None or self._cpu.per_s is not None

    @property
    def slower_bytes_per_s(self) -> float:
        """The lower of the rates at which may be sent and received, headers left out; infinite without a limit."""
        return min(self._up.per_s or math.inf, self._down.per_s or math.inf) / OVERHEAD

    @property
    def sent_bytes(self) -> int:
        """All bytes so far, headers included."""
        return round(self._up.total)

    @property
    def received_bytes(self) -> int:
        """All bytes so far, headers included."""
        return round(self._down.total)

    @property
    def cpu_s(self) -> float:
        """Processor time that was counted."""
        return self._cpu.total

    def sent(self, n_bytes: int) -> float:
        """Count a message; seconds to rest."""
        return max(self._up.take(n_bytes * OVERHEAD), self.rest_s())

    def received(self, n_bytes: int) -> float:
        """Count a message; seconds to rest."""
        return max(self._down.take(n_bytes * OVERHEAD), self.rest_s())

    def owed_s(self) -> float:
        """Seconds until all that was taken so far is paid for: nothing that can wait is begun before."""
        return max(self._up.wait_s(), self._down.wait_s(), self.rest_s())

    def rest_s(self) -> float:
        """Seconds to rest for what was computed until now, by whatever part of the node."""
        if self._use is None:
            return 0.0
        with self._counting:
            now_s = self._use.cpu_s()
            used_s, self._counted_cpu_s = now_s - self._counted_cpu_s, now_s
        return self._cpu.take(max(0.0, used_s))

    def count_child(self) -> None:
        """Count p2pd's traffic: too much rather than too little, as what it passes on to the node is in it."""
        if self._use is None or self._counted_io is None:
            return
        with self._counting:
            before, self._counted_io = self._counted_io, self._use.child_io()
            now = self._counted_io
        self._up.take(max(0, now.written - before.written))
        self._down.take(max(0, now.read - before.read))


def _cores(limits: Limits) -> float | None:
    return limits.cpu_percent / 100 if limits.cpu_percent else None


CREDIT_S = 1.0
"""The seconds of an unused rate that may be used later, so that small messages need not wait for each other."""


class TokenBucket:
    """A bucket of `per_s` a second, None for no limit; it counts the `total` in either case. Thread-safe."""

    def __init__(self, per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self._clock = per_s, clock
        self._lock = threading.Lock()
        self._paid_at_s = clock()
        self.total = 0.0

    def refill_at(self, per_s: float | None) -> None:
        """Have another rate from now on; what is not paid for yet is paid for at that one."""
        with self._lock:
            now_s = self._clock()
            owed = max(0.0, self._paid_at_s - now_s) * (self.per_s or 0.0)
            self.per_s, self._paid_at_s = per_s, now_s + (owed / per_s if per_s else 0.0)

    def take(self, amount: float) -> float:
        """Take it; seconds until everything that was taken is paid for."""
        with self._lock:
            self.total += amount
            if self.per_s is None:
                return 0.0
            now_s = self._clock()
            self._paid_at_s = max(self._paid_at_s, now_s - CREDIT_S) + amount / self.per_s
            return max(0.0, self._paid_at_s - now_s)

    def wait_s(self) -> float:
        """Seconds until what was taken so far is paid for."""
        return self.take(0.0)
