"""What a host tells of whether it works: in its event log, and in a file of its folder that `health` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class HeldReason:
    """What keeps a host from working: the reason's name, a sentence, and since when.

    `until_s`: when it will end by itself, None where nobody knows. Both times in seconds since 1970.
    """

    name: str
    why: str
    since_s: float
    until_s: float | None


@dataclass(frozen=True, kw_only=True)
class AvailabilityEvent(Event):
    """Why the host does not work now, nothing if it does; and what it cannot know of its owner's conditions."""

    event: ClassVar[str] = "availability"

    reasons: tuple[HeldReason, ...]
    unknown: tuple[str, ...]
