"""A run's history on a thread of its own: a slow disk holds up neither the watch nor a page."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from common.errors import CheckpointError, KilohiveError, UnavailableError
from coordinator.dashboard.history import SPANS, Curves, RunHistory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path
    from typing import TypeVar

    R = TypeVar("R")

logger = logging.getLogger(__name__)

READ_S = 5.0
CLOSE_S = 2.0


class HistoryThread:
    """Made by `open`, ended by `close`. Belongs to the event loop."""

    def __init__(self, executor: ThreadPoolExecutor, history: RunHistory) -> None:
        self._executor, self._history = executor, history
        self._adding: Future[None] | None = None
        self._problem = ""

    @classmethod
    async def open(cls, path: Path, run_id: str, max_bytes: int) -> HistoryThread:
        """Open the file of a run. Raises ConfigError."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="history")
        try:
            history = await asyncio.wrap_future(executor.submit(RunHistory, path, run_id, max_bytes))
        except KilohiveError:
            executor.shutdown()
            raise
        return cls(executor, history)

    def add(self, t_s: float, sample: Mapping[str, float | None], evaluations: Sequence[tuple[int, float]]) -> None:
        """Have a sample written; it is left out while the one before is still being written."""
        if self._adding is None or self._adding.done():
            self._adding = self._executor.submit(self._add, t_s, sample, evaluations)

    async def curves(self, span: str, now_s: float) -> Curves:
        """What is kept of the span of that name. Raises UnavailableError if the disk does not answer in time."""
        return await self._read(lambda: self._history.curves(SPANS[span], now_s))

    async def evaluations(self) -> list[tuple[int, float]]:
        """Tokens of the run, growing, and held-out bits per byte. Raises UnavailableError as above."""
        return await self._read(self._history.evaluations)

    async def close(self) -> None:
        """Close the file, after what was to be written; a disk that does not answer is left to its thread."""
        closing = self._executor.submit(self._history.close)
        self._executor.shutdown(wait=False)
        await asyncio.wait({asyncio.wrap_future(closing)}, timeout=CLOSE_S)

    def _add(self, t_s: float, sample: Mapping[str, float | None], evaluations: Sequence[tuple[int, float]]) -> None:
        problem = ""
        try:
            self._history.add(t_s, sample, evaluations)
        except CheckpointError as error:
            problem = str(error)
        if problem and problem != self._problem:  # once, not at every sample
            logger.warning("%s; the page goes on without keeping what it shows", problem)
        self._problem = problem

    async def _read(self, work: Callable[[], R]) -> R:
        reading = asyncio.wrap_future(self._executor.submit(work))
        try:
            return await asyncio.wait_for(reading, READ_S)
        except TimeoutError:
            raise UnavailableError(f"the history was not read within {READ_S:g} s; is its disk slow?") from None
