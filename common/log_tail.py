"""The last lines of a process's log, kept in memory for whoever asks."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
"""Libraries give levels other names."""

MAX_LINES = 100
MAX_LINE_CHARS = 1000
NOT_KEPT = "is_not_kept"
"""An extra of a line that is for the log alone: `logger.info(..., extra={NOT_KEPT: True})`."""


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """What was logged at `t_s`, seconds since 1970; one that was too long is cut."""

    t_s: float
    level: str
    text: str


class LogTail(logging.Handler):
    """Keeps the newest lines of all loggers while its context lasts. Thread-safe."""

    def __init__(self, max_lines: int = MAX_LINES) -> None:
        super().__init__()
        self._lines: deque[LogLine] = deque(maxlen=max_lines)

    @property
    def lines(self) -> tuple[LogLine, ...]:
        """The oldest first."""
        return tuple(self._lines.copy())  # copied in one step: other threads may log meanwhile

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line, unless it is secret."""
        if getattr(record, NOT_KEPT, False):
            return
        text = record.getMessage()[:MAX_LINE_CHARS]
        level = LEVELS.get(record.levelno, record.levelname.lower())
        self._lines.append(LogLine(t_s=round(record.created, 3), level=level, text=text))

    @contextmanager
    def listening(self) -> Iterator[LogTail]:
        """Hear all loggers while the context lasts."""
        root = logging.getLogger()
        root.addHandler(self)
        try:
            yield self
        finally:
            root.removeHandler(self)
