"""Who may touch a training's tensors, and when: turns (steps, evaluations), short calls between them, and looks."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import DrainingError
from common.tasks import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor

R = TypeVar("R")


class TrunkLock:
    """One at a time: a turn (a step, an evaluation), or a function given to `call`. Safe in any thread.

    Neither starves. The thread that ends one, or is about to change what it computed with, runs the functions that came
    meanwhile, and a turn that wants to begin waits for at most one function. In an idle training they run on `pool` at
    once. `look` does not wait for a turn: most of a step only reads.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="kilohive-reader")
        self._running = threading.Lock()
        self._changing = threading.Lock()
        self._state = threading.Lock()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._trunk_lock_wanted = 0
        self._closed = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nothing else runs inside the `with` block. A turn inside a turn would wait for itself."""
        with self._state:
            self._trunk_lock_wanted += 1
        try:
            with self._running:
                with self._state:
                    self._trunk_lock_wanted -= 1
                try:
                    yield
                finally:
                    self._let_in()
        finally:
            self._wake()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside a turn: nobody looks during the `with` block. Functions that wait run before it."""
        self._let_in()
        with self._changing:
            yield

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Run `function` between turns; it must not wait for a turn or another call. DrainingError once closed."""
        future: Future[R] = Future()
        with self._state:
            if self._closed:
                raise DrainingError("this trainer is leaving the swarm")
            self._queue.append((future, function))
        self._wake()
        return future

    def look(self, function: Callable[[], R]) -> Future[R]:
        """Run `function`, which must change nothing, as soon as nothing changes. DrainingError once closed."""
        with self._state:
            if self._closed:
                raise DrainingError("this trainer is leaving the swarm")
            return self._readers.submit(self._look, function)

    def close(self) -> None:
        """Refuse further calls; those that wait fail with DrainingError. The pool must be shut down first."""
        with self._state:
            self._closed = True
        self._readers.shutdown()
        while self._queue:
            future, _ = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(DrainingError("this trainer is leaving the swarm"))

    def _look(self, function: Callable[[], R]) -> R:
        with self._changing:
            return function()

    def _let_in(self) -> None:
        # Only as many as have come: a stream of calls must not hold the training up.
        for _ in range(len(self._queue)):
            self._run_one()

    def _wake(self) -> None:
        """Have what waits run, unless a turn does: that one looks at the queue once more after it has ended."""
        if self._queue:
            try:
                self._pool.submit(self._run_if_free)
            except RuntimeError:  # the pool is shut down: `close` answers
                return

    def _run_if_free(self) -> None:
        while self._queue and not self._trunk_lock_wanted and self._running.acquire(blocking=False):
            try:
                self._run_one()
            finally:
                self._running.release()

    def _run_one(self) -> None:
        try:
            future, function = self._queue.popleft()
        except IndexError:  # closed meanwhile
            return
        with self._changing:
            settle(future, function)
