"""Coroutines that compute threads start on the event loop, until the node leaves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import DrainingError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Coroutine

R = TypeVar("R")

LOOP_GRACE_S = 20.0
"""Every coroutine has its own deadline; how much later the loop must have ended it, or it has stopped."""

LOOP_STOPPED = "the event loop did not answer: is it still running?"


class LoopBridge:
    """Starts coroutines on `loop` from any other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._in_flight: set[concurrent.futures.Future[Any]] = set()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """How many have not ended."""
        return len(self._in_flight)

    def start(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        """Its future, which `close` cancels; raises DrainingError once closed."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise DrainingError("this trainer is leaving")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._in_flight.add(future)
        future.add_done_callback(self._ended)
        return future

    def run(self, coroutine: Coroutine[Any, Any, R], timeout_s: float) -> R:
        """Its result, which it gives within `timeout_s`; raises DrainingError if `close` comes first."""
        future = self.start(coroutine)
        done, _ = concurrent.futures.wait((future,), timeout_s + LOOP_GRACE_S)
        if not done:
            future.cancel()
            raise UnavailableError(LOOP_STOPPED)
        try:
            return future.result(0)
        except concurrent.futures.CancelledError:
            raise DrainingError("this trainer is leaving") from None

    def close(self) -> None:
        """Cancel what is in flight, refuse what comes later."""
        with self._lock:
            self._closed = True
            in_flight = list(self._in_flight)
        for future in in_flight:
            future.cancel()

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._in_flight.discard(future)
