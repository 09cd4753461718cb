"""Tasks on an event loop, and threads that wait for them: the periodic, the bounded, those that a stop ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from common.errors import DeadlineError, DrainingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

R = TypeVar("R")


class Periodic:
    """Runs `work` every `period_s` seconds between `start` and `stop`; `work` handles its own failures."""

    def __init__(self, name: str, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        self._name, self._period_s, self._work = name, period_s, work
        self._task: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()

    def start(self) -> None:
        """Begin, with the first run one period from now."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    def hurry(self) -> None:
        """Make the next run begin at once; nothing happens before `start` or after `stop`."""
        self._hurried.set()

    async def stop(self) -> None:
        """End it, in the middle of a run if need be. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        self._hurried.clear()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._hurried.wait()
            self._hurried.clear()
            await self._work()


async def repeat(
    work: Callable[[], Awaitable[None]], pause_s: Callable[[], float], *, at_once: bool = False
) -> NoReturn:
    """Run `work` until cancelled, with `pause_s()` seconds before each run, before the first too unless `at_once`.

    What `work` raises ends it.
    """
    if at_once:
        await work()
    while True:
        await asyncio.sleep(pause_s())
        await work()


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """DeadlineError when the body takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what} took longer than {seconds:.1f} s") from None


async def both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run two coroutines at once; the first error of either ends both and is raised."""
    tasks = [asyncio.create_task(first), asyncio.create_task(second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Run coroutines at once until one of them ends, however it does; the others are cancelled and waited for."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def beside(work: Coroutine[Any, Any, R], meanwhile: Coroutine[Any, Any, None]) -> R:
    """`work`'s result; `meanwhile`, which has no end, goes on beside it. An error of either ends both."""
    working, going_on = asyncio.ensure_future(work), asyncio.ensure_future(meanwhile)
    try:
        await asyncio.wait({working, going_on}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            going_on.result()
        return await working
    finally:
        for task in (working, going_on):
            task.cancel()
        await asyncio.gather(working, going_on, return_exceptions=True)


async def until_stopped(work: Coroutine[Any, Any, R], stop: asyncio.Event) -> R:
    """`work`'s result; DrainingError, with `work` cancelled, as soon as `stop` is set."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DrainingError("stopped before it was done")
        return working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def on_thread(name: str, function: Callable[[], R]) -> Future[R]:
    """Run `function` on a thread of its own: one that never returns keeps nothing else from running or from ending."""
    future: Future[R] = Future()
    threading.Thread(target=settle, args=(future, function), name=name, daemon=True).start()
    return future


def settle(future: Future[R], function: Callable[[], R]) -> None:
    """Run `function` and give `future` what it returns or raises; nothing runs if `future` was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001 - task boundary: the error belongs to whoever waits, and must reach him
        future.set_exception(error)
