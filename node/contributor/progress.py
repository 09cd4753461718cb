"""What a contributor's terminal shows while it waits or trains; elsewhere a line in the log from time to time."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from common.progress import LOG_EVERY_S, progress_shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


@contextmanager
def words_shown(at_first: str) -> Iterator[Callable[[str], None]]:
    """A line that changes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log().tell
        return
    with console.status(at_first) as status:
        yield lambda words: status.update(Text(words))  # a peer's words are no markup


@contextmanager
def steps_shown(steps: int) -> Iterator[Callable[[int, float], None]]:
    """Give what is to be told how many steps are done, and the last one's loss in nats per token."""
    with progress_shown(steps) as tell:
        yield lambda done, loss: tell(done, f"step {done:,}/{steps:,}, train {loss:.3f} nats/token")


class _Log:
    """Most of what it is told within a few seconds it keeps to itself."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def tell(self, words: str) -> None:
        if time.monotonic() >= self._next_s:
            logger.info("%s", words)
            self._next_s = time.monotonic() + LOG_EVERY_S
