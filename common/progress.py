"""How far a long piece of work is: a bar on a terminal, elsewhere a line in the log from time to time."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

logger = logging.getLogger(__name__)

LOG_EVERY_S = 5.0


@contextmanager
def progress_shown(total: float | None, after_s: float = 0.0) -> Iterator[Callable[[float, str], None]]:
    """Give what is to be told how much of `total` is done, and in words what; it shows nothing before `after_s`.

    `total` is None where nobody knows it.
    """
    console = Console(stderr=True)
    with ExitStack() as stack:
        shown: _Log | _Bar = _Bar(console, total, stack) if console.is_terminal else _Log()
        next_s = time.monotonic() + after_s

        def tell(done: float, words: str) -> None:
            nonlocal next_s
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + shown.every_s
                shown.tell(done, words)

        yield tell


class _Log:
    every_s = LOG_EVERY_S

    @staticmethod
    def tell(_: float, words: str) -> None:
        logger.info("%s", words)


class _Bar:
    every_s = 0.0

    def __init__(self, console: Console, total: float | None, stack: ExitStack) -> None:
        self._console, self._total, self._stack = console, total, stack
        self._bar: tuple[Progress, TaskID] | None = None

    def tell(self, done: float, words: str) -> None:
        if self._bar is None:
            progress = self._stack.enter_context(Progress(console=self._console, transient=True))
            self._bar = progress, progress.add_task(words, total=self._total)
        progress, task = self._bar
        progress.update(task, completed=done, description=words)
