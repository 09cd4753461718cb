"""Events as a log has them, for tests that hold on to what stands there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from common.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def as_written(event: Event, t_s: float = 0.0) -> dict[str, Any]:
    """What a reader of the log finds on its line."""
    row: dict[str, Any] = json.loads(json.dumps({"t": t_s, **event.to_row()}))
    return row


def written_to(rows: list[dict[str, Any]]) -> Callable[[Event, float], None]:
    """A subscriber that keeps every event as it is written."""
    return lambda event, t_s: rows.append(as_written(event, t_s))


def classes_in(module: ModuleType) -> tuple[type[Event], ...]:
    """The events that a module defines, in its order."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Event)]
    return tuple(kind for kind in kinds if kind.__module__ == module.__name__)


def key(field: str) -> str:
    """The name that a field has in a log."""
    return field.removesuffix("_")
