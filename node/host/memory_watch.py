"""Watches a running host's memory: near the limit it takes no more calls and frees what it can, over it a block goes.

What is planned at the start (`memory.py`) is an estimate; this is measured.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.allocator import give_back_memory
from common.errors import KilohiveError, OverloadedError
from common.sizes import size_text
from common.tasks import repeat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from node.host.serving.runtime import Runtime
    from node.limits.process_usage import ProcessUse

logger = logging.getLogger(__name__)

LOOK_S = 1.0
LOOK_SELDOM_S = 30.0
"""Without a limit, only to be told: the system counts for 7 ms each time, and the node stands still meanwhile."""

REFUSE_ABOVE = 0.97
OVER_FOR_LOOKS = 5
"""How many checks in a row must be over the limit before a block is given up: an exchange comes and goes."""

RETRY_AFTER_S = 1.0
DEVICE_CHECK_S = 2.0


class MemoryWatch:
    """`give_up_one` gives up a block; asked for again as long as there is too little memory."""

    def __init__(self, limit_bytes: int | None, use: ProcessUse, give_up_one: Callable[[str], Awaitable[None]]) -> None:
        self._use, self._give_up_one = use, give_up_one
        self.limit_bytes = limit_bytes
        """None for no limit; may be set at any time."""
        self._over = 0
        self.used_bytes = 0
        self.tight = False

    def refusal(self) -> KilohiveError | None:
        """Why no call is taken now."""
        return OverloadedError("this host's memory is full", RETRY_AFTER_S) if self.tight else None

    async def watch(self) -> None:
        """Look again and again."""
        await repeat(self.look, lambda: LOOK_SELDOM_S if self.limit_bytes is None else LOOK_S, at_once=True)

    async def look(self) -> None:
        """Measure, and do what has to be done."""
        self.used_bytes = await asyncio.to_thread(self._use.memory_bytes)
        limit = self.limit_bytes
        if limit is None:
            self.tight = False
            return
        if self.used_bytes > limit * REFUSE_ABOVE:
            await asyncio.to_thread(give_back_memory)
            self.used_bytes = await asyncio.to_thread(self._use.memory_bytes)
        self.tight = self.used_bytes > limit * REFUSE_ABOVE
        self._over = self._over + 1 if self.used_bytes > limit else 0
        if self._over >= OVER_FOR_LOOKS:
            self._over = 0
            await self._give_up_one(f"it takes {size_text(self.used_bytes)} of the {size_text(limit)} that it may")


async def watch_device_memory(runtime: Runtime, give_up_one: Callable[[str], Awaitable[None]]) -> None:
    """Give a block up whenever the device had no memory for a batch, until cancelled."""
    seen = 0
    while True:
        await asyncio.sleep(DEVICE_CHECK_S)
        if runtime.out_of_memory > seen:
            seen = runtime.out_of_memory
            await give_up_one("the device had no memory for a batch")
