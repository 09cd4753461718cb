"""The event stream: one JSON line per event, for programs; people read the same words in logs and tables."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Event = dict[str, Any]


class EventLog:
    """Appends events to `path` (or only tells subscribers, if None). Thread-safe."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._subscribers: list[Callable[[Event], None]] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8") if path is not None else None

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every later event, in the emitting thread."""
        self._subscribers.append(callback)

    def emit(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - an event's fields are whatever JSON holds
        """Write {"t": seconds since 1970, "event": ..., fields}."""
        row = {"t": round(self._clock(), 3), "event": event, **fields}
        with self._lock:
            if self._file is not None and not self._file.closed:
                self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
        for callback in self._subscribers:
            callback(row)

    def close(self) -> None:
        """Close the file; later events still reach the subscribers."""
        with self._lock:
            if self._file is not None:
                self._file.close()
