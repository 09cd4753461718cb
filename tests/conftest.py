"""For every test: its event loop is uvloop's, as in the product, and what it leaks fails it.

A test that leaves a task, a thread, a child process or a socket behind, or lets an error escape in a task that nobody
awaits, fails, and no other test does. Fixtures of a module may keep hosts running: a test's snapshot is taken after
they are set up, and the module's own snapshot, taken before, is compared when they are torn down. Async tests that use
such hosts run in their loop (`@pytest.mark.asyncio(loop_scope="module")`). A session's fixture that starts something
must be autouse in its folder's conftest.py, so that it runs before the module's snapshot.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import hypothesis  # noqa: F401  it looks for who holds the generators of others, which it cannot see once frozen
import pytest
import pytest_asyncio
import torch
import uvloop
from xdist.scheduler import LoadFileScheduling

from tests.support import leaks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from types import FrameType

    from xdist.remote import Producer

_SWARMS = ("tests/faults/", "tests/swarm/")
_DEFERRED = "leaks_checked_per_module"


def pytest_configure() -> None:
    """Sees orphans of killed nodes as this process's children, and shares the machine with them: one torch thread."""
    leaks.adopt_orphans()
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Under nohup: nodes that tests start would inherit it, and be deaf to the hangups that tests send them.
        signal.signal(signal.SIGHUP, _hear_nothing)


def _hear_nothing(_number: int, _frame: FrameType | None) -> None:
    """Go on, like a process that ignores a signal, but without its children ignoring it."""


class _OneSwarmAtATime(LoadFileScheduling):  # type: ignore[misc]  # xdist is not annotated
    """Files to whichever worker is free, but all that start a swarm of processes to one: two swarms are too many."""

    def _split_scope(self, nodeid: str) -> str:
        return "swarms" if nodeid.startswith(_SWARMS) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """How tests are shared among the workers of `-n`."""
    return _OneSwarmAtATime(config, log)


def pytest_collection_finish() -> None:
    """Set aside what was imported, for good: after every async test the collector looks for tasks that died unheard."""
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that async tests run on."""
    return {"uvloop": _new_loop}


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix=leaks.POOL_THREAD_PREFIX))
    return loop


@pytest.fixture(autouse=True, scope="module")
def _module_leaves_nothing() -> Iterator[list[leaks.Snapshot]]:
    known = [leaks.snapshot()]  # and after each test that was blamed, what it left
    yield known
    _fail_if(leaks.leaks_since(reduce(or_, known)), "this module left behind")


@pytest.fixture(autouse=True)
def _test_leaves_nothing(
    request: pytest.FixtureRequest, _module_leaves_nothing: list[leaks.Snapshot]
) -> Iterator[None]:
    before = leaks.snapshot()
    yield
    if request.node.get_closest_marker(_DEFERRED) is not None:
        return
    shared_loop = _loop_scope(request.node) not in {None, "function"}
    found = leaks.leaks_since(before, shared_loop=shared_loop)
    if found:
        _module_leaves_nothing.append(leaks.snapshot())
    _fail_if(found, "this test left behind")


@pytest.fixture(autouse=True)
def _test_leaves_no_task(request: pytest.FixtureRequest, _test_leaves_nothing: None) -> None:
    # Set up before the test's own async fixtures, on the test's loop: torn down after them, while the loop still lives.
    scope = _loop_scope(request.node)
    if scope is not None:
        request.getfixturevalue(f"_no_task_left_in_{scope}_loop")


@pytest_asyncio.fixture(loop_scope="function")
async def _no_task_left_in_function_loop(_test_leaves_nothing: None) -> AsyncIterator[None]:
    async for _ in _no_task_left(deferred=False):
        yield


@pytest_asyncio.fixture(loop_scope="module")
async def _no_task_left_in_module_loop(
    request: pytest.FixtureRequest, _test_leaves_nothing: None
) -> AsyncIterator[None]:
    async for _ in _no_task_left(deferred=request.node.get_closest_marker(_DEFERRED) is not None):
        yield


async def _no_task_left(*, deferred: bool) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    before = leaks.tasks()
    escaped: list[str] = []

    def on_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        escaped.append(_describe(context))
        if isinstance(context.get("exception"), pytest.fail.Exception):
            # pytest-timeout's signal came while uvloop was idle: it cannot raise inside the test, so end the test here.
            for task in asyncio.all_tasks(loop) - before.keys():
                task.cancel()

    loop.set_exception_handler(on_error)
    yield
    left = [] if deferred else await leaks.tasks_left(before)
    gc.collect()  # "exception was never retrieved" is reported when the task is collected
    loop.set_exception_handler(None)
    _fail_if(escaped, "an error escaped in a task or callback of this test")
    _fail_if(left, "this test left tasks running")


def _loop_scope(item: pytest.Item) -> str | None:
    """The scope of the event loop that a test runs in; None for a test that is not async."""
    if not pytest_asyncio.is_async_test(item):
        return None
    marker = item.get_closest_marker("asyncio")
    return str(marker.kwargs.get("loop_scope", "function")) if marker else "function"


def _describe(context: dict[str, Any]) -> str:
    where = context.get("task") or context.get("handle") or ""
    return f"{context.get('message')}: {context.get('exception')!r} {where}"


def _fail_if(found: list[str], what: str) -> None:
    if found:
        pytest.fail(f"{what}:\n  " + "\n  ".join(found), pytrace=False)
