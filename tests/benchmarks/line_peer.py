"""A process that a benchmark talks to: one line per command and answer. Whatever happens, nothing of it is left after.

It may abandon processes of its own, as hivemind does: they are ended with its process group.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from experiments.harness.provenance import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


class NoAnswerError(RuntimeError):
    """It runs, and has not answered in time."""


class LinePeer:
    """`python -m MODULE --name value ...`. Raises RuntimeError with its last words when it fails.

    The caller must have called `adopt_orphans`, or processes that it abandons would be out of reach.
    """

    def __init__(self, module: str, arguments: Mapping[str, object], log: Path, words: Sequence[str] = ()) -> None:
        flags = [str(part) for pair in arguments.items() for part in pair]
        self._name, self._log = module.rpartition(".")[2], log
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                (sys.executable, "-m", module, *words, *flags),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process itself; what it started is below it."""
        return self._popen.pid

    def tell(self, command: str) -> None:
        """Write one line to it."""
        if self._popen.stdin is None:
            raise RuntimeError(f"{self._name} has no input")
        self._popen.stdin.write(f"{command}\n".encode())
        self._popen.stdin.flush()

    def answer(self, timeout_s: float) -> str:
        """The next line; each is short and written at once."""
        if self._popen.stdout is None:
            raise RuntimeError(f"{self._name} has no output")
        line = self._read(self._popen.stdout.fileno(), time.monotonic() + timeout_s)
        if line is None:
            raise NoAnswerError(f"{self._name} did not answer within {timeout_s:.0f} s; {self._last_words()}")
        if not line:
            raise RuntimeError(f"{self._name} ended; {self._last_words()}")
        return line.strip()

    def _read(self, pipe: int, deadline: float) -> str | None:
        """Empty when the process has ended, None when the time is up. Its children hold the pipe too: it stays open."""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if selector.select(POLL_S):
                    return os.read(pipe, 4096).decode()
                if _has_ended(self._popen.pid):
                    return ""
        return None

    def close(self) -> None:
        """End of input, time to leave, then SIGKILL to its whole process group; reap every one."""
        with contextlib.suppress(BrokenPipeError):
            if self._popen.stdin is not None:
                self._popen.stdin.close()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not _has_ended(self._popen.pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        # Not reaped yet, so the group's number is still its own; the orphans become this process's children.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        try:
            self._popen.wait(STOP_TIMEOUT_S)
        finally:
            _reap_group(self._popen.pid)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-8:]
        return "\n".join((f"its log {self._log} ends:", *lines))


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _reap_group(group: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-group, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(POLL_S)
