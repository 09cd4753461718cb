"""Tells how far downloads are that take longer than a moment: in the log, and as events."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.averaging.events import DownloadEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

FIRST_AFTER_S = 2.0
TELL_EVERY_S = 10.0


@dataclass
class _Running:
    begun_s: float
    begun_bytes: int
    next_s: float
    n_bytes: int


class DownloadProgress:
    """Hears of each piece that comes. Belongs to the event loop."""

    def __init__(self, events: EventLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._clock = events, clock
        self._running: dict[BlockId, _Running] = {}

    def tell(self, block_id: BlockId, n_bytes: int, of_bytes: int) -> None:
        """Note how many bytes of a block are here; this is told after FIRST_AFTER_S and then every TELL_EVERY_S."""
        now_s = self._clock()
        running = self._running.get(block_id)
        if running is None or n_bytes <= running.n_bytes:
            running = self._running[block_id] = _Running(now_s, n_bytes, now_s + FIRST_AFTER_S, n_bytes)
        running.n_bytes = n_bytes
        if n_bytes >= of_bytes:
            del self._running[block_id]
        elif now_s >= running.next_s and now_s > running.begun_s:
            running.next_s = now_s + TELL_EVERY_S
            rate = (n_bytes - running.begun_bytes) / (now_s - running.begun_s)
            self._emit(block_id, n_bytes, of_bytes, rate)

    def _emit(self, block_id: BlockId, n_bytes: int, of_bytes: int, rate: float) -> None:
        left_s = (of_bytes - n_bytes) / rate
        logger.info(
            "Block %s: %.1f of %.1f MB are here, at %.2f MB/s; %.0f s left",
            block_id,
            n_bytes / 1e6,
            of_bytes / 1e6,
            rate / 1e6,
            left_s,
        )
        self._events.emit(
            DownloadEvent(
                block=str(block_id),
                bytes=n_bytes,
                of_bytes=of_bytes,
                bytes_per_s=round(rate),
                seconds_left=round(left_s, 1),
            )
        )
