"""What a test may leave behind: nothing. Snapshots of this process's threads, children, sockets and tasks, compared.

`tests/conftest.py` takes a snapshot before each test and module and fails the one that left something. Teardown is
allowed `GRACE_S` to finish, because closing a connection or ending a process takes a moment even when all is well.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GRACE_S = 2.0
_POLL_S = 0.02
POOL_THREAD_PREFIX = "loop"  # workers of a test loop's default executor; closing the loop joins them

# Python threads that are nobody's leak, by a part of their name.
_ALLOWED_THREADS = (
    "_poll_wrapper",  # grpc.aio's one poller per process: ends when the last grpc.aio object is garbage, tests later
    "pytest_timeout",  # pytest-timeout's own timer, with its thread method
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What this process held at one moment. Threads and processes are kept as objects: ids are used again."""

    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]
    sockets: frozenset[tuple[Any, ...]]

    def __or__(self, other: Snapshot) -> Snapshot:
        return Snapshot(
            threads=self.threads | other.threads,
            children=self.children | other.children,
            sockets=self.sockets | other.sockets,
        )


def snapshot() -> Snapshot:
    """Python threads, running children (grandchildren too) and inet sockets of this process."""
    return Snapshot(
        threads=frozenset(thread for thread in threading.enumerate() if _is_ours(thread)),
        children=frozenset(_running_children()),
        sockets=frozenset(_inet_sockets()),
    )


def leaks_since(before: Snapshot, *, shared_loop: bool = False) -> list[str]:
    """Waits up to `GRACE_S` for whatever is new since `before` to go away, and describes what did not.

    Args:
        before: The snapshot to compare with.
        shared_loop: An event loop that outlives the test is in use, and with it the threads of its default executor.
    """

    def left() -> list[str]:
        now = snapshot()
        pool = POOL_THREAD_PREFIX if shared_loop else None
        return [
            *(_describe_thread(t) for t in now.threads - before.threads if pool is None or not t.name.startswith(pool)),
            *(_describe_process(process) for process in now.children - before.children),
            *(_describe_socket(socket) for socket in now.sockets - before.sockets),
        ]

    return _poll(left)


def tasks() -> dict[asyncio.Task[Any], str]:
    """The running loop's unfinished tasks and what each runs (a finished one no longer knows)."""
    return {task: getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}


async def tasks_left(before: Mapping[asyncio.Task[Any], str]) -> list[str]:
    """Waits up to `GRACE_S` for tasks that were not there `before` to end, and describes those that do not.

    A task that merely took the place of an older one of the same kind is no leak: a grpc.aio server that a module's
    tests share makes a new one for each request that it accepts.
    """

    def left() -> dict[asyncio.Task[Any], str]:
        now = tasks()
        more = Counter(now.values()) - Counter(before.values())
        return {task: kind for task, kind in now.items() if task not in {*before, this} and kind in more}

    this = asyncio.current_task()
    deadline = time.monotonic() + GRACE_S
    while (found := left()) and time.monotonic() < deadline:  # noqa: ASYNC110  others' tasks have no event to wait for
        await asyncio.sleep(_POLL_S)
    return [_describe_task(task, kind) for task, kind in found.items()]


def is_running(process: psutil.Process) -> bool:
    """Whether the process still does something: one that has ended but was not waited for (a zombie) does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def adopt_orphans() -> None:
    """Makes this process the new parent of grandchildren whose parent dies, so that a snapshot sees them (Linux only).

    Without it the daemon of a host that a test killed would go on, as a child of init, and nobody would notice.
    """
    if not sys.platform.startswith("linux"):
        return
    pr_set_child_subreaper = 36  # prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot adopt orphaned processes")


def _poll(left: Callable[[], list[str]]) -> list[str]:
    found = left()
    if found:
        gc.collect()  # what only a reference cycle still holds closes now
    deadline = time.monotonic() + GRACE_S
    while found and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        found = left()
    return found


def _is_ours(thread: threading.Thread) -> bool:
    # A native thread (torch's, gRPC's) that once ran Python code is listed for good, as a dummy: nobody can join it.
    if isinstance(thread, threading._DummyThread):
        return False
    return not any(part in thread.name for part in _ALLOWED_THREADS)


def _running_children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if is_running(process)]


def _inet_sockets() -> list[tuple[Any, ...]]:
    connections = psutil.Process().net_connections(kind="inet")
    return [(c.fd, c.type, tuple(c.laddr), tuple(c.raddr)) for c in connections]


def _describe_thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "not running yet"
    return f"thread {thread.name!r} ({'daemon' if thread.daemon else 'not a daemon'}), now at {where}"


def _describe_process(process: psutil.Process) -> str:
    try:
        return f"process {process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"process {process.pid}"


def _describe_socket(socket: tuple[Any, ...]) -> str:
    fd, kind, local, remote = socket
    to = f" connected to {remote[0]}:{remote[1]}" if remote else ""
    return f"{kind.name} socket fd {fd} at {':'.join(map(str, local)) or 'no address'}{to}"


def _describe_task(task: asyncio.Task[Any], kind: str) -> str:
    stack = task.get_stack(limit=1)
    where = f"{stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else "its start"
    return f"task {task.get_name()!r} of {kind}, waiting at {where}"
