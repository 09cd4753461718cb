"""A clock for threads that only wait: it jumps to the next time somebody waits for, once everybody waits.

One thread runs at a time and ties go by the threads' numbers, so that what happens does not depend on the machine.
"""

from __future__ import annotations

import heapq
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

A = TypeVar("A")
R = TypeVar("R")

PATIENCE_S = 600.0
"""Real seconds after which a thread that nobody wakes gives up: another must have hung."""


class VirtualClock:
    """`now_s` passes while the functions of `run` sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        self._awake = 0
        self._number = threading.local()

    def run(self, function: Callable[[A], R], items: Sequence[A], every_s: float = 0.0) -> list[R]:
        """`function` of every item, each on a thread of its own, one begun `every_s`; results in the items' order."""
        self._awake, began_s = len(items), self.now_s
        with ThreadPoolExecutor(len(items), thread_name_prefix="virtual") as pool:
            turns = [(number, began_s + number * every_s) for number in range(len(items))]
            futures = [pool.submit(self._work, function, item, turn) for item, turn in zip(items, turns, strict=True)]
            return [future.result() for future in futures]

    def sleep_until(self, time_s: float) -> None:
        """Called by a function of `run`."""
        woken = threading.Event()
        with self._lock:
            heapq.heappush(self._sleepers, (max(time_s, self.now_s), self._number.value, woken))
            self._rest()
        if not woken.wait(PATIENCE_S):
            raise TimeoutError("the virtual clock stands still")

    def _work(self, function: Callable[[A], R], item: A, turn: tuple[int, float]) -> R:
        self._number.value, begins_s = turn
        self.sleep_until(begins_s)
        try:
            return function(item)
        finally:
            with self._lock:
                self._rest()

    def _rest(self) -> None:
        """One thread fewer is awake; the next one is woken if that was the last."""
        self._awake -= 1
        if not self._awake and self._sleepers:
            self.now_s, _, woken = heapq.heappop(self._sleepers)
            self._awake = 1
            woken.set()
