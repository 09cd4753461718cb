"""What a host does and takes of its machine, as the `load` event tells it from time to time."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from common.tasks import repeat
from node.host.metrics import load_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from node.host.events import LoadEvent
    from node.host.memory_watch import MemoryWatch
    from node.host.serving.runtime import Runtime
    from node.limits.rate_limits import RateLimits

LOAD_EVENT_PERIOD_S = 2.0
IDLE_PERIOD_S = 60.0
"""How often an idle host tells what it takes."""

ALWAYS_MOVING: Final = frozenset({"sent_bytes", "received_bytes", "cpu_s", "memory_bytes"})
"""What also changes while a host does nothing but stay in the swarm."""


class LoadEvents:
    """Belongs to the event loop; `exchanged_bytes` counts what averaging and downloads moved, both ways."""

    def __init__(
        self,
        runtime: Runtime,
        rate_limits: RateLimits,
        memory: MemoryWatch,
        exchanged_bytes: Callable[[], int],
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime, self._rate_limits, self._memory = runtime, rate_limits, memory
        self._exchanged_bytes, self._events, self._clock = exchanged_bytes, events, clock
        self._told: LoadEvent | None = None
        self._told_s = 0.0

    async def emit_forever(self) -> None:
        """Emit the event again and again, until cancelled."""
        await repeat(self._tell, lambda: LOAD_EVENT_PERIOD_S)

    async def _tell(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Emit the event if the host has done something since the last one, or if that is long ago."""
        runtime, rate_limits = self._runtime, self._rate_limits
        rate_limits.count_child()
        event, now_s = load_event(runtime, rate_limits, self._exchanged_bytes(), self._memory.used_bytes), self._clock()
        idle = self._told is not None and _work(event) == _work(self._told)
        if idle and now_s - self._told_s < IDLE_PERIOD_S:
            return
        self._told, self._told_s = event, now_s
        self._events.emit(event)


def _work(event: LoadEvent) -> dict[str, object]:
    """The part of it that an idle host does not change."""
    return {name: value for name, value in asdict(event).items() if name not in ALWAYS_MOVING}
