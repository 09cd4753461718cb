"""What a lighthouse does again and again, on trio; `common.tasks.repeat` is the same on asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def repeat(work: Callable[[], Awaitable[None]], pause_s: float, *, at_once: bool = False) -> NoReturn:
    """Run `work` until cancelled, with a pause before each run, before the first too unless `at_once`."""
    if at_once:
        await work()
    while True:
        await trio.sleep(pause_s)
        await work()
