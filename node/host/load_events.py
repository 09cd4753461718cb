"""What a host does and takes of its machine, as the `load` event tells it from time to time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.tasks import repeat
from node.host.metrics import load_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from node.host.memory_watch import MemoryWatch
    from node.host.serving.runtime import Runtime
    from node.limits.rate_limits import RateLimits

LOAD_EVENT_PERIOD_S = 2.0


class LoadEvents:
    """Belongs to the event loop; `exchanged_bytes` counts what averaging and downloads moved, both ways."""

    def __init__(
        self,
        runtime: Runtime,
        rate_limits: RateLimits,
        memory: MemoryWatch,
        exchanged_bytes: Callable[[], int],
        events: EventLog,
    ) -> None:
        self._runtime, self._rate_limits, self._memory = runtime, rate_limits, memory
        self._exchanged_bytes, self._events = exchanged_bytes, events

    async def emit_forever(self) -> None:
        """Emit the event again and again, until cancelled."""
        await repeat(self._emit, lambda: LOAD_EVENT_PERIOD_S)

    async def _emit(self) -> None:
        runtime, rate_limits = self._runtime, self._rate_limits
        rate_limits.count_child()
        self._events.emit(load_event(runtime, rate_limits, self._exchanged_bytes(), self._memory.used_bytes))
