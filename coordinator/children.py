"""Child processes that cannot be left behind: each in a session of its own, with a pipe as standard input.

Ctrl+C in the terminal reaches only the parent, which ends them all. If the parent is killed, the pipes close and the
children, started with `--stop-on-stdin-eof`, leave by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROGRAM = (sys.executable, str(Path(__file__).resolve().parent.parent / "run_node.py"))
"""The command line up to the subcommand."""

POLL_S = 0.02
REAP_TIMEOUT_S = 5.0
COMPUTING_SHARE = 0.1
"""A child that takes this share of a processor computes; what waits for others takes less."""

TAIL_LINES = 12
TAIL_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """What to run. `log` takes its output; None leaves it the terminal."""

    name: str
    argv: tuple[str, ...]
    log: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """A running child process; `bury` must be called in the end. Raises OSError if it cannot be started."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        with contextlib.ExitStack() as stack:
            log = None
            if spec.log is not None:
                spec.log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(spec.log.open("ab"))
            self._popen = subprocess.Popen(
                spec.argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        self._process = psutil.Process(self._popen.pid)

    @property
    def name(self) -> str:
        """The child's name, as its spec has it."""
        return self.spec.name

    @property
    def pid(self) -> int:
        """Process id, which is also its process group's."""
        return self._popen.pid

    def ended(self) -> bool:
        """Whether it has exited; it is not reaped yet, so that its process group's number cannot be anyone else's."""
        return self._popen.returncode is not None or self._process.status() == psutil.STATUS_ZOMBIE

    async def wait(self, stop: asyncio.Event) -> None:
        """Return once it has exited, or once `stop` is set."""
        while not self.ended() and not stop.is_set():  # noqa: ASYNC110 - as `end_all` does
            await asyncio.sleep(POLL_S)

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self._popen.terminate()

    def kill_tree(self) -> None:
        """SIGKILL it and its descendants, those in sessions of their own too."""
        descendants = self._process.children(recursive=True)
        self._popen.kill()
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()

    def reap(self) -> int:
        """Kill what is left of its process group, reap it; returns its exit code, negative for a signal."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
                os.killpg(self._popen.pid, signal.SIGKILL)
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        return self._popen.wait(timeout=REAP_TIMEOUT_S)

    def log_tail(self, n_lines: int = TAIL_LINES) -> str:
        """The last lines of its log."""
        if self.spec.log is None or not (size := self.log_bytes()):
            return ""
        with self.spec.log.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
        return "\n".join(lines[-n_lines:])

    def log_bytes(self) -> int:
        """How long its log is; 0 without one."""
        return self.spec.log.stat().st_size if self.spec.log is not None and self.spec.log.exists() else 0

    def cpu_s(self) -> float:
        """Processor time that it has taken, without its descendants."""
        try:
            times = self._process.cpu_times()
        except psutil.ZombieProcess:  # macOS, where it has just ended
            return 0.0
        return float(times.user + times.system)


class ProgressWatch:
    """Whether a child that has work to do still gets on with it: its log grows, or it computes."""

    def __init__(self, child: Child, patience_s: float) -> None:
        self._child, self._patience_s = child, patience_s
        self._mark()

    def has_stalled(self) -> bool:
        """Whether nothing has come of it for `patience_s` seconds; to be asked again and again while it runs."""
        child, least_s = self._child, self._patience_s * COMPUTING_SHARE
        if child.log_bytes() != self._log_bytes or child.cpu_s() - self._cpu_s >= least_s:
            self._mark()
        return time.monotonic() - self._since > self._patience_s

    def _mark(self) -> None:
        self._since, self._log_bytes, self._cpu_s = time.monotonic(), self._child.log_bytes(), self._child.cpu_s()


async def end_all(
    children: Sequence[Child], stop: asyncio.Event, *, patience_s: float, stop_patience_s: float
) -> list[str]:
    """End every child: SIGTERM to all at once, time to leave, SIGKILL to the rest; then reap. None is left after.

    They get `patience_s` seconds, but only `stop_patience_s` once `stop` is set: then a person is waiting.
    Returns the names of those that had to be killed.
    """
    killed: list[str] = []
    started = time.monotonic()
    for child in children:
        if not child.ended():
            child.ask_to_stop()
    try:
        while not all(child.ended() for child in children):
            if time.monotonic() - started > (stop_patience_s if stop.is_set() else patience_s):
                break
            await asyncio.sleep(POLL_S)
    finally:
        for child in children:
            if not child.ended():
                child.kill_tree()
                killed.append(child.name)
        for child in children:
            child.reap()
    return killed


def exit_words(code: int) -> str:
    """How a process ended, for a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
