"""What the peers that benchmarks start in processes of their own share: a private way to answer, and a clean end."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TextIO

import psutil

END_TIMEOUT_S = 3.0


def private_stdout() -> TextIO:
    """The pipe to the benchmark; what hivemind and its processes print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def end_descendants() -> None:
    """Kill and reap whatever is left below this process: hivemind abandons what does not stop within 5 s."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=END_TIMEOUT_S)
