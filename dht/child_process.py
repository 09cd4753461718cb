"""A child process whose end a node sees even where the program around it handles SIGCHLD itself.

asyncio and uvloop learn of a child's end by that signal. A researcher's script may take it away: torch's DataLoader
does so with its first worker, and nothing would ever be told that p2pd has ended. So a thread reads what the child
writes, and waits for its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_LINE_BYTES = 4096


class ChildProcess:
    """A process in a session of its own, without standard input. Raises OSError if it cannot be started.

    `heard` is called in the running event loop with each line that it writes, errors too, until it has ended.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], heard: Callable[[str], None]) -> None:
        self._loop, self._heard = asyncio.get_running_loop(), heard
        self._ended = asyncio.Event()
        self._code: int | None = None
        self._popen = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        threading.Thread(target=self._watch, name=f"child {self.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that has ended it."""
        return self._code

    async def wait(self) -> int:
        """Wait until it has ended and all that it wrote was heard; the exit code."""
        await self._ended.wait()
        return self._code or 0

    def terminate(self) -> None:
        """Ask it to end, if it has not yet."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it, if it has not yet."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody asks any more
            with self._popen:
                while self._popen.stdout is not None and (line := self._popen.stdout.readline(MAX_LINE_BYTES)):
                    self._loop.call_soon_threadsafe(self._heard, line.decode(errors="replace").strip())
                self._code = self._popen.wait()
            self._loop.call_soon_threadsafe(self._ended.set)
