"""On the path of a node's Python, this shifts its wall clock by the seconds in a file, now and whenever that changes.

A step of a machine's clock cannot be made for one process alone; what Python's own `time.time` says can. It is read at
each start of Python that has this folder in PYTHONPATH, and does nothing without KILOHIVE_TEST_CLOCK.
"""

from __future__ import annotations

import os
import time


def _step_with(path: str) -> None:
    real_time, real_time_ns = time.time, time.time_ns

    def offset_s() -> float:
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123 - pathlib is slow to import at every start
                return float(file.read() or 0.0)
        except OSError:
            return 0.0

    time.time = lambda: real_time() + offset_s()
    time.time_ns = lambda: real_time_ns() + int(offset_s() * 1e9)


if file_name := os.environ.get("KILOHIVE_TEST_CLOCK"):
    _step_with(file_name)
