"""The event stream: one JSON line per event, for programs; people read the same words in logs and tables."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Event = dict[str, Any]

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to `path` (or only tells subscribers, if None). Thread-safe.

    A file of `max_bytes` becomes `NAME.previous`, in place of the one before, and a new one is begun.
    """

    def __init__(
        self, path: Path | None = None, clock: Callable[[], float] = time.time, max_bytes: int | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._clock = clock
        self._subscribers: list[Callable[[Event], None]] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line that could not be written leaves nothing behind that fails again at the next one.
        self._file = path.open("ab", buffering=0) if path is not None else None
        self._lost_lines = 0

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every later event, in the emitting thread."""
        self._subscribers.append(callback)

    def emit(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - an event's fields are whatever JSON holds
        """Write {"t": seconds since 1970, "event": ..., fields}."""
        row = {"t": round(self._clock(), 3), "event": event, **fields}
        with self._lock:
            self._write(json.dumps(row, separators=(",", ":")).encode())
        for callback in self._subscribers:
            callback(row)

    def _write(self, line: bytes) -> None:
        """A full disk costs lines, not the node; a person is told when that begins."""
        if self._file is None or self._file.closed:
            return
        # After a failure half a line may be there: end it, so that only that one is spoilt.
        data = (b"\n" if self._lost_lines else b"") + line + b"\n"
        try:
            complete = self._file.write(data) == len(data)
            reason = "the disk took a part of a line"
        except OSError as error:
            complete, reason = False, error.strerror or type(error).__name__
        if not complete and not self._lost_lines:
            logger.error("cannot write the event log %s: %s; going on without it", self._file.name, reason)
        self._lost_lines = 0 if complete else self._lost_lines + 1
        if self._max_bytes is not None and self._file.tell() >= self._max_bytes:
            self._begin_anew(Path(self._file.name))

    def _begin_anew(self, path: Path) -> None:
        try:
            path.replace(path.with_name(f"{path.name}.previous"))
            self._file, full = path.open("ab", buffering=0), self._file
        except OSError as error:
            logger.warning("the event log %s cannot be begun anew: %s", path, error.strerror)
            return
        if full is not None:
            full.close()

    def close(self) -> None:
        """Close the file; later events still reach the subscribers."""
        with self._lock:
            if self._file is not None:
                self._file.close()
