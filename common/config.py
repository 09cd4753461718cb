"""Settings that several roles share. Light, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.events import LOG_FILES, MAX_LOG_BYTES
from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation

EVENT_LOG_MINIMUMS: Final = {"event_log_mb": 0, "event_log_files": 1}
"""These minimums are for `check_minimums`."""


@dataclass(frozen=True, kw_only=True)
class EventLogConfig:
    """How much of its event log a node keeps."""

    event_log_mb: FileOnly[float] = MAX_LOG_BYTES / 1e6
    """Begin a new file of the event log after so many megabytes; 0 keeps one file without end."""
    event_log_files: FileOnly[int] = LOG_FILES
    """Keep this many files of the event log; the oldest goes first."""

    @property
    def event_log_bytes(self) -> int:
        """The size after which a new file is begun."""
        return int(self.event_log_mb * 1e6)
