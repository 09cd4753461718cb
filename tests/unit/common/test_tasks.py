"""What the helpers for tasks promise beyond what their users' tests see."""

from __future__ import annotations

import asyncio
import threading

import pytest

from common.backoff import backoff_s
from common.tasks import beside, on_thread, repeat, until_one_ends


async def test_work_is_repeated_after_each_pause_and_ends_with_its_error() -> None:
    pauses_s, asked = [0.0, 0.0, 0.0], []

    async def work() -> None:
        asked.append(len(pauses_s))
        if not pauses_s:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        await repeat(work, pauses_s.pop)
    assert asked == [2, 1, 0]
    pauses_s, asked = [0.0], []
    with pytest.raises(ValueError, match="enough"):
        await repeat(work, pauses_s.pop, at_once=True)
    assert asked == [1, 0]


async def test_the_first_that_ends_ends_the_others_whatever_it_raised() -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("is not told")

    await until_one_ends(waits(), fails())
    assert ended == ["waits"]


async def test_what_goes_on_beside_a_work_ends_with_it_and_its_error_ends_the_work() -> None:
    ended = []

    async def goes_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("goes on")

    async def works() -> int:
        await asyncio.sleep(0)
        return 7

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("enough")

    assert await beside(works(), goes_on()) == 7
    with pytest.raises(ValueError, match="enough"):
        await beside(fails(), goes_on())
    with pytest.raises(ValueError, match="enough"):
        await beside(goes_on(), fails())
    assert ended == ["goes on"] * 3


async def test_a_function_on_a_thread_gives_what_it_returns_or_raises() -> None:
    def fail() -> None:
        raise ValueError("enough")

    running = on_thread("a test's", threading.current_thread)
    thread = await asyncio.wrap_future(running)
    assert (thread.name, thread.daemon) == ("a test's", True)
    with pytest.raises(ValueError, match="enough"):
        await asyncio.wrap_future(on_thread("a test's", fail))


def test_a_backoff_doubles_up_to_its_limits() -> None:
    assert [backoff_s(2.0, n, max_doublings=3) for n in range(6)] == [2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
    assert [backoff_s(2.0, n, max_s=10.0) for n in (0, 2, 3, 10_000)] == [2.0, 8.0, 10.0, 10.0]
