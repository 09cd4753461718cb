"""Ports for what a test starts and has to name before it listens."""

from __future__ import annotations

import contextlib
import os
import socket


def free_port() -> int:
    """Below the range from which the kernel gives ports to other programs' connections."""
    for port in range(20_000 + os.getpid() % 5000, 30_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 30000")
