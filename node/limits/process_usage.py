"""What a node takes of its machine: processor time, memory and p2pd's traffic, for the process and its one child.

Read from the processes themselves, so that it is the same in a container, whatever the container allows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

CHILD_PERIOD_S = 1.0
"""Reading another process's times is a look into files."""


class ChildIo(NamedTuple):
    """Bytes that the child has written and read: to and from the network, and to and from the node."""

    written: int
    read: int


class ProcessUse:
    """The usage of this process and of the child `child_pid`, None for none. Thread-safe.

    When another process has taken the child's place (`follow`), the processor time of the one before stays counted.
    """

    def __init__(self, child_pid: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = psutil.Process()
        self._child = psutil.Process(child_pid) if child_pid is not None else None
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = float("-inf")
        self._child_cpu_s = 0.0
        self._former_cpu_s = 0.0

    def follow(self, child_pid: int) -> None:
        """Count the process that has taken the child's place."""
        with self._lock, contextlib.suppress(psutil.Error):  # it may have ended, too
            child = psutil.Process(child_pid)
            if child == self._child:
                return
            self._child, self._looked_s = child, float("-inf")
            self._former_cpu_s, self._child_cpu_s = self._former_cpu_s + self._child_cpu_s, 0.0

    def cpu_s(self) -> float:
        """Seconds of processor time since the start; the child's as of the last second."""
        with self._lock:
            if self._child is not None and self._clock() - self._looked_s >= CHILD_PERIOD_S:
                self._looked_s = self._clock()
                with contextlib.suppress(psutil.Error):  # it has ended: what it took stays
                    times = self._child.cpu_times()
                    self._child_cpu_s = times.user + times.system
            return time.process_time() + self._former_cpu_s + self._child_cpu_s

    def memory_bytes(self) -> int:
        """Memory that would be free without them: of a page that several processes share, this one's part."""
        total = 0
        for process in (self._own, self._child):
            with contextlib.suppress(psutil.Error):
                if process is not None:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.uss)
        return total

    def child_io(self) -> ChildIo:
        """Return the bytes of the child that runs now; zeros where the platform does not tell."""
        with contextlib.suppress(psutil.Error, AttributeError):
            if self._child is not None:
                io = self._child.io_counters()
                return ChildIo(io.write_chars, io.read_chars)
        return ChildIo(0, 0)
