"""Starts p2pd again when it dies, after pauses that grow, and gives up when it cannot be started any more."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dht.daemon import Daemon

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 8.0
MAX_STARTS = 8
"""The most starts in a row of which none lasted: together they take about half a minute."""

STEADY_S = 60.0
"""A p2pd that lived for so long was well: its death is the first of a new row."""


class RestartBackoff:
    """How long to wait before each start: the first of a row comes at once, each later one after a longer pause."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts = 0
        self._up_since_s = clock()

    def started(self) -> None:
        """Note that p2pd runs from now on."""
        self._up_since_s = self._clock()

    def died(self) -> None:
        """Note that p2pd, which ran until now, has ended."""
        if self._clock() - self._up_since_s >= STEADY_S:
            self._starts = 0

    def next_pause_s(self) -> float | None:
        """Seconds to wait before the next start; None after MAX_STARTS of one row."""
        if self._starts >= MAX_STARTS:
            return None
        self._starts += 1
        return 0.0 if self._starts == 1 else min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._starts - 2))


class DaemonSupervisor:
    """Keeps one node's p2pd running. `start` makes a process, `take_over` connects the node to it."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        start: Callable[[], Awaitable[Daemon]],
        take_over: Callable[[Daemon], Awaitable[None]],
        backoff: RestartBackoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.daemon = daemon
        self._start, self._take_over, self._sleep = start, take_over, sleep
        self._backoff = backoff or RestartBackoff()

    async def restarted(self) -> None:
        """Wait until p2pd dies, then start it again. Raises UnavailableError when that cannot be done."""
        code = await self.daemon.ended()
        self._backoff.died()
        problem = f"p2pd has ended with exit code {code}"
        while (pause_s := self._backoff.next_pause_s()) is not None:
            when = f"in {pause_s:g} s" if pause_s else "now"
            logger.warning("%s; it is started again %s, with the same identity and port", problem, when)
            await self._sleep(pause_s)
            try:
                await self._start_once()
            except UnavailableError as error:
                problem = f"p2pd cannot be started again: {error}"
                continue
            self._backoff.started()
            logger.info("p2pd runs again as process %d", self.daemon.pid)
            return
        raise UnavailableError(f"{problem}; this was the last of {MAX_STARTS} tries in a row, restart this node")

    async def _start_once(self) -> None:
        await self.daemon.stop()  # it has ended; this removes its folder
        daemon = await self._start()
        try:
            await self._take_over(daemon)
        except BaseException:  # cancelled, too: no process stays
            await daemon.stop()
            raise
        self.daemon = daemon
