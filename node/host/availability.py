"""Whether a host works now, and why not: one place for its owner, the schedule, a machine in use, and one that slept.

Belongs to the event loop. `node/host/pause.py` carries out what is decided here.
"""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum
from typing import TYPE_CHECKING

from common.clock import clock_with_sleep
from common.errors import DrainingError
from dht.record_versions import TTL_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.errors import KilohiveError

logger = logging.getLogger(__name__)


class Reason(StrEnum):
    """Why a host does not work."""

    OWNER = "its owner paused it"
    SCHEDULE = "it is outside its schedule"
    IN_USE = "somebody else needs the machine"
    SLEPT = "the machine slept"
    DEVICE = "its device fails"


class Availability:
    """A host works while there is no reason against it: exactly one of the events `pausing` and `working` is set.

    `leave` is set when the owner asks the host to go for good.
    """

    def __init__(self, clock: Callable[[], float] = clock_with_sleep) -> None:
        self._clock = clock
        self._looked_s = clock()
        self._reasons: frozenset[Reason] = frozenset()
        self.pausing, self.working, self.leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.working.set()
        self.away = False
        """True from when the blocks are given up until they are back."""
        self.holding = True
        """Whether blocks may be here, whole or on their way."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not work now, in words."""
        return tuple(str(reason) for reason in Reason if reason in self._reasons)

    @property
    def has_slept(self) -> bool:
        """Whether what this host holds may be old."""
        return Reason.SLEPT in self._reasons

    def tell(self, reason: Reason, *, holds: bool) -> None:
        """A reason against working holds now, or does not."""
        self._reasons = self._reasons | {reason} if holds else self._reasons - {reason}
        now, no_longer = (self.pausing, self.working) if self._reasons else (self.working, self.pausing)
        no_longer.clear()
        now.set()

    def look(self) -> None:
        """Notice a sleep. To be called often, and before anything is said or answered.

        A host that is not heard of for so long is forgotten by the others, who have trained on.
        """
        now_s = self._clock()
        gap_s, self._looked_s = now_s - self._looked_s, now_s
        if gap_s > TTL_S and self.holding:
            logger.warning("This node stood still for %.0f s: its blocks are fetched anew", gap_s)
            self.tell(Reason.SLEPT, holds=True)

    def refusal(self) -> KilohiveError | None:
        """Why no call is taken now."""
        self.look()
        if not (self.away or self.has_slept):
            return None
        return DrainingError("this host is paused: choose another replica")
