"""A background task that does one thing again and again: refresh, announce, publish."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Periodic:
    """Runs `work` every `period_s` seconds between `start` and `stop`; `work` handles its own failures."""

    def __init__(self, name: str, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        self._name, self._period_s, self._work = name, period_s, work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with the first run one period from now."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """End it, in the middle of a run if need be. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._work()
