"""Whether a host works now, and why not: one place for its owner, the owner's conditions, a device that fails, a sleep.

Belongs to the event loop. `node/host/availability_monitor.py` looks at the conditions, `node/host/pause.py` carries out
what is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from common.clock import clock_with_sleep
from common.errors import DrainingError
from dht.record_versions import TTL_S
from node.limits.events import HeldReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.errors import KilohiveError
    from protocol.announcements import PauseCause

logger = logging.getLogger(__name__)

SLEPT = "the machine slept"


class Reason(StrEnum):
    """The names of what can keep a host from working, as events and metrics have them."""

    OWNER = "owner"
    SCHEDULE = "schedule"
    PROCESSORS = "processors"
    PERSON = "person"
    BATTERY = "battery"
    PROGRAM = "program"
    GPU = "gpu"
    SLEPT = "sleep"
    DEVICE = "device"


CAUSES: Mapping[str, PauseCause] = MappingProxyType(
    {
        Reason.DEVICE: "device",
        Reason.SLEPT: "sleep",
        Reason.OWNER: "owner",
    }
)
"""What others are told of a pause, the first that holds; of all other reasons, that the owner's conditions say so."""


class Availability:
    """A host works while there is no reason against it: exactly one of the events `pausing` and `working` is set.

    `leave` is set when the owner asks the host to go for good, `changed` whenever there is something new to tell.
    """

    def __init__(self, clock: Callable[[], float] = clock_with_sleep, now_s: Callable[[], float] = time.time) -> None:
        self._clock, self._now_s = clock, now_s
        self._looked_s = clock()
        self._held: Mapping[Reason, HeldReason] = MappingProxyType({})
        self._unknown: Mapping[Reason, str] = MappingProxyType({})
        self.pausing, self.working, self.leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.changed = asyncio.Event()
        self.working.set()
        self.away = False
        """True from when the blocks are given up until they are back."""
        self.holding = True
        """Whether blocks may be here, whole or on their way."""

    @property
    def held(self) -> tuple[HeldReason, ...]:
        """Why it does not work now, and since when. Read in any thread."""
        held = self._held
        return tuple(held[reason] for reason in Reason if reason in held)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not work now, in words."""
        return tuple(one.why for one in self.held)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What cannot be known of the owner's conditions here, in words."""
        return tuple(self._unknown[reason] for reason in Reason if reason in self._unknown)

    @property
    def cause(self) -> PauseCause:
        """Whose doing the pause is, as others are told; no more than that is their business."""
        if not self._held:
            return "none"
        return next((cause for reason, cause in CAUSES.items() if reason in self._held), "condition")

    @property
    def since_s(self) -> float:
        """Since when it does not work, in seconds since 1970; 0 while it does."""
        return min((one.since_s for one in self.held), default=0.0)

    @property
    def until_s(self) -> float | None:
        """When it works again by itself, in seconds since 1970; None where that is not known of all reasons."""
        ends = [one.until_s for one in self.held]
        known = [end_s for end_s in ends if end_s is not None]
        return max(known) if known and len(known) == len(ends) else None

    @property
    def has_slept(self) -> bool:
        """Whether what this host holds may be old."""
        return Reason.SLEPT in self._held

    def tell(self, reason: Reason, why: str, until_s: float | None = None) -> None:
        """The host must not work for this reason, as the sentence `why` says; "" if it does not hold, or no longer.

        `until_s`: when it will end by itself, in seconds since 1970, None if that is not known.
        """
        before = self._held.get(reason)
        others = {one: held for one, held in self._held.items() if one != reason}
        if why:
            since_s = before.since_s if before else round(self._now_s(), 3)
            others[reason] = HeldReason(name=str(reason), why=why, since_s=since_s, until_s=until_s)
        if others.get(reason) == before:
            return
        self._held = MappingProxyType(others)
        now, no_longer = (self.pausing, self.working) if others else (self.working, self.pausing)
        no_longer.clear()
        now.set()
        self.changed.set()

    def tell_unknown(self, reason: Reason, sentence: str) -> None:
        """Whether `reason` holds cannot be known here, as `sentence` says; "" if it can."""
        if self._unknown.get(reason, "") == sentence:
            return
        others = {one: told for one, told in self._unknown.items() if one != reason}
        self._unknown = MappingProxyType({**others, reason: sentence} if sentence else others)
        self.changed.set()

    def look(self) -> None:
        """Notice a sleep. To be called often, and before anything is said or answered.

        A host that is not heard of for so long is forgotten by the others, who have trained on.
        """
        now_s = self._clock()
        gap_s, self._looked_s = now_s - self._looked_s, now_s
        if gap_s > TTL_S and self.holding:
            logger.warning("This node stood still for %.0f s: its blocks are fetched anew", gap_s)
            self.tell(Reason.SLEPT, SLEPT)

    def refusal(self) -> KilohiveError | None:
        """Why no call is taken now."""
        self.look()
        if not (self.away or self.has_slept):
            return None
        return DrainingError("this host is paused: choose another replica")
