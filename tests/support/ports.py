"""Ports for what a test starts and has to name before it listens."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

FIRST, FOR_EACH_WORKER, WORKERS = 20_000, 1_000, 12
"""Below the range from which the kernel gives ports to other programs' connections."""

_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """A port that nobody listens on; of another thousand for each worker of the tests, and never twice in a row."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    for number in itertools.islice(_numbers, FOR_EACH_WORKER):
        port = FIRST + FOR_EACH_WORKER * worker + number % FOR_EACH_WORKER
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port between {FIRST} and {FIRST + FOR_EACH_WORKER * WORKERS}")
