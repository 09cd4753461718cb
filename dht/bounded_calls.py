"""Calls into hivemind: bounded in time for us, but never cancelled.

hivemind's searches, when cancelled, leave helper tasks that wait for ever. So a call that is late is no longer waited
for and ends by itself: each of its steps is one call to one peer, which has a timeout, and fails at once on `close`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import KilohiveError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

T = TypeVar("T")


class BoundedCalls:
    """Calls of one node, those that are waited for and those that no longer are."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def begin(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a call that may outlive its caller."""
        task = asyncio.create_task(call)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return task

    async def within(self, timeout_s: float, call: Callable[[], Awaitable[T]]) -> T:
        """Await a call; raises UnavailableError if it fails in a way of hivemind's or takes longer than `timeout_s`."""
        task = self.begin(_run(call))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise UnavailableError(f"dht: no answer in {timeout_s:g} s")
        try:
            return task.result()
        except KilohiveError:
            raise
        except Exception as error:  # the boundary of hivemind, which does not name the errors that it raises
            raise UnavailableError(f"dht: the request failed: {error!r}") from error

    async def drain(self, timeout_s: float) -> None:
        """Wait for late calls to end."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: nobody may be waiting for it any more


async def _run(call: Callable[[], Awaitable[T]]) -> T:
    return await call()
