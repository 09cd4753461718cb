"""What a host or a trainer tells in its event log of how others reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class ReachabilityEvent(Event):
    """What others said when they dialled this node back has changed. `asked` counts those that answered."""

    event: ClassVar[str] = "reachability"

    state: str
    endpoint: str
    observed: str
    asked: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class RelaysEvent(Event):
    """The relays through which this node is reached, by peer id, have changed."""

    event: ClassVar[str] = "relays"

    relays: tuple[str, ...]
