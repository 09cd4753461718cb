"""The event stream: one JSON line per event, for programs; people read the same words in logs and tables.

An event is a frozen dataclass beside the part that emits it. Whoever reads it, in a log or as a subscriber, reads that
class.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from common.errors import InvalidInputError
from common.log_files import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 10_000_000
LOG_FILES = 5


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. A subclass sets `event`, its name in a log; its fields are written in their order.

    They hold what JSON can: numbers, texts, booleans, None, tuples, dictionaries with texts as keys, and dataclasses of
    these. A field whose name is a Python keyword has an underscore after it, which is not written.
    """

    event: ClassVar[str]

    def to_row(self) -> dict[str, Any]:
        """What its line holds, but for the time."""
        return {"event": self.event, **{_key(name): value for name, value in asdict(self).items()}}


E = TypeVar("E", bound=Event)


def read_event(line: str | bytes, *kinds: type[E]) -> E | None:
    """The event on a line of a log; None if it is not one of `kinds`, or if a crash cut the line short.

    Fields that a newer version has added are ignored, and those that an older one did not have take their defaults.
    Raises InvalidInputError for one that is ill-typed, or missing without a default.
    """
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    kind = next((kind for kind in kinds if kind.event == row.get("event")), None)
    if kind is None:
        return None
    event: E = _filled(kind, row, f"event {kind.event!r}")
    return event


def _filled(kind: type[Any], row: dict[str, object], where: str) -> Any:  # noqa: ANN401 - an instance of `kind`
    """An instance of the dataclass `kind`, an event or a part of one; errors say `where` the row is."""
    values: dict[str, Any] = {}
    defaults = {field.name for field in fields(kind) if field.default is not MISSING}
    for name, hint in _hints(kind).items():  # type: ignore[arg-type] # a class can be hashed
        place = f"{where}, field {_key(name)!r}"
        if _key(name) in row:
            values[name] = _parsed(row[_key(name)], hint, place)
        elif name not in defaults:
            raise InvalidInputError(place, "is missing")
    return kind(**values)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """The types of its fields, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _parsed(value: object, hint: Any, where: str) -> Any:  # noqa: ANN401 - a value of the type `hint`
    """`value`, as JSON has it, as `hint` says, which is an annotation of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return _filled(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_parsed(item, arguments[0], where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _parsed(item, arguments[1], where) for key, item in value.items()}
    if origin is UnionType:  # something or None
        return None if value is None else _parsed(value, arguments[0], where)
    if hint is float and type(value) is int:
        return float(value)
    if hint is object or type(value) is hint:
        return value
    raise InvalidInputError(where, f"must be of the type {getattr(hint, '__name__', hint)}")


def _key(name: str) -> str:
    """A field's name in a log."""
    return name.removesuffix("_")


class EventLog:
    """Appends events to `path` (or only tells subscribers, if None). Thread-safe.

    A file of `max_bytes` becomes NAME.1, what that was becomes NAME.2, and a new one is begun; `n_files` are kept. A
    file that goes is shown to `before_drop` first. With `max_bytes` of 0 there is one file without end.
    """

    def __init__(
        self,
        path: Path | None = None,
        clock: Callable[[], float] = time.time,
        max_bytes: int = MAX_LOG_BYTES,
        n_files: int = LOG_FILES,
        before_drop: Callable[[Path], None] = lambda _path: None,
    ) -> None:
        self._rotate_at, self._max_bytes, self._n_files = max_bytes, max_bytes, n_files
        self._before_drop = before_drop
        self._lock = threading.Lock()
        self._clock = clock
        self._subscribers: list[Callable[[Event, float], None]] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line that could not be written leaves nothing behind that fails again at the next one.
        self._file = path.open("ab", buffering=0) if path is not None else None
        self._lost_lines = 0

    def subscribe(self, callback: Callable[[Event, float], None]) -> None:
        """Call `callback` with every later event and its time, seconds since 1970, in the emitting thread."""
        self._subscribers.append(callback)

    def emit(self, event: Event) -> None:
        """Write {"t": seconds since 1970, "event": its name, its fields}."""
        t_s = round(self._clock(), 3)
        with self._lock:
            self._write(json.dumps({"t": t_s, **event.to_row()}, separators=(",", ":")).encode())
        for callback in self._subscribers:
            callback(event, t_s)

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
        if self._max_bytes and self._file.tell() >= self._rotate_at:
            self._begin_anew(Path(self._file.name))

    def _begin_anew(self, path: Path) -> None:
        try:
            rotate(path, self._n_files, self._before_drop)
            self._file, full = path.open("ab", buffering=0), self._file
        except OSError as error:
            logger.warning("the event log %s cannot be begun anew: %s", path, error.strerror)
            self._rotate_at += self._max_bytes  # not to be tried again, and told, at every line
            return
        self._rotate_at = self._max_bytes
        if full is not None:
            full.close()

    def close(self) -> None:
        """Close the file; later events still reach the subscribers."""
        with self._lock:
            if self._file is not None:
                self._file.close()
