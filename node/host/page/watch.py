"""Asks the host again and again while somebody looks, and tells every open page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from common.errors import KilohiveError, StorageError
from common.seldom import Seldom
from common.tasks import Periodic
from node.host.owner_socket import STATUS, ask
from node.host.page.credit import CreditReader
from node.host.page.state import RateWindow, page_state, silent_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from common.web.feed import Feed
    from node.host.page.credit import CreditFigures

logger = logging.getLogger(__name__)

LOOK_S: Final = 2.0
CREDIT_S: Final = 10.0


class HostWatch:
    """Of the host of a folder. Belongs to the event loop. `looked_at_s`: when a page was last open, by `clock`."""

    def __init__(self, folder: Path, feed: Feed, act_key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._feed, self._act_key, self._clock = folder, feed, act_key, clock
        self._rates = RateWindow()
        self._run_id, self._reader = "", CreditReader(folder, "")
        self._credit: CreditFigures | None = None
        self._credit_s = float("-inf")
        self._told = Seldom()
        self.looked_at_s = clock()

    def every(self, period_s: float = LOOK_S) -> Periodic:
        """Return what looks every `period_s` seconds, to be started and stopped."""
        return Periodic("host watch", period_s, self.look)

    async def look(self) -> None:
        """Ask once and tell every open page; nothing is asked for nobody."""
        if not self._feed.n_clients:
            self._feed.forget()
            return
        self.looked_at_s = self._clock()
        try:
            told = await ask(self._folder, STATUS)
            state = await self._state(told)
        except KilohiveError as error:
            state = silent_state(str(error))
        except (KeyError, TypeError, ValueError):
            state = silent_state(f"{self._folder}: its host is of another version: start it again")
        self._feed.publish(json.dumps(state, separators=(",", ":"), allow_nan=False).encode())

    async def _state(self, told: dict[str, Any]) -> dict[str, Any]:
        self._rates.add(told)
        if self._clock() - self._credit_s >= CREDIT_S or told["run_id"] != self._run_id:
            self._credit_s = self._clock()
            self._credit = await self._read_credit(str(told["run_id"]), float(told["now_s"]))
        return page_state(told, self._rates, self._credit, self._act_key)

    async def _read_credit(self, run_id: str, now_s: float) -> CreditFigures | None:
        """What cannot be read is not shown; the log says so."""
        if run_id != self._run_id:
            self._run_id, self._reader = run_id, CreditReader(self._folder, run_id)
        try:
            return await asyncio.to_thread(self._reader.read, now_s)
        except StorageError as error:
            if self._told.due("credit"):
                logger.warning("Credit is not shown now: %s", error)
            return None
