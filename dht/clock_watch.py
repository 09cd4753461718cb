"""What a node does when its machine's clock is set while it runs, and how it learns that its clock is wrong."""

from __future__ import annotations

import asyncio
import logging
from statistics import median
from typing import TYPE_CHECKING

from common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from common.clock import SteadyClock

logger = logging.getLogger(__name__)

LOOK_S = 1.0
STEP_S = 1.0
"""A smaller jump does no harm, and is what a time server's corrections make."""

SETTLE_S = 2.0
"""How long peers on the same machine have to see the same step before they are asked."""

SAY_SYSTEM_S = 15.0
ASK_TIMES = 5

MAX_OFF_S = 3.0
"""hivemind takes nobody in whose clock is further off than this."""


class ClockWatch:
    """One node's. `ask` returns how far some peers' clocks are ahead of `clock`; None where there are no peers."""

    def __init__(
        self,
        clock: SteadyClock,
        ask: Callable[[], Awaitable[list[float] | None]],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._ask, self._sleep = clock, ask, sleep
        self._seen_s = 0.0

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self._sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Decide which time to go on by if the system's clock was set since the last look."""
        ahead_s = self._clock.ahead_s()
        step_s, self._seen_s = ahead_s - self._seen_s, ahead_s
        if abs(step_s) < STEP_S:
            return
        self._clock.say_system(SAY_SYSTEM_S)
        step = (
            f"The system clock was set {'forward' if step_s > 0 else 'back'} by {abs(step_s):.0f} s while this node ran"
        )
        found = await self._peers_times()
        if found is None or (found and abs(median(found) - ahead_s) < abs(median(found))):
            self._clock.follow()
            self._seen_s = 0.0
            why = "it has no peers" if found is None else "its peers' clocks agree with the new time"
            logger.warning("%s; %s, so it takes the new time", step, why)
        else:
            why = "its peers' clocks do not agree with that" if found else "no peer says what time it is"
            logger.warning("%s; %s, so it goes on by the time before: set the clock right", step, why)

    async def _peers_times(self) -> list[float] | None:
        for _ in range(ASK_TIMES):
            await self._sleep(SETTLE_S)
            found = await self._ask()
            if found is None or found:
                return found
        return []


def check_clock(ahead_s: Iterable[float]) -> None:
    """Raise UnavailableError if peers' clocks, each so far ahead of this machine's, say that this one is wrong."""
    found = list(ahead_s)
    off_s = median(found) if found else 0.0
    if abs(off_s) <= MAX_OFF_S:
        return
    how = f"{abs(off_s):.1f} s {'behind' if off_s > 0 else 'ahead of'}"
    whose = "that of the peer" if len(found) == 1 else f"those of the {len(found)} peers"
    raise UnavailableError(
        f"clock: this machine's clock is {how} {whose} that it joins through, and at most {MAX_OFF_S:g} s are allowed; "
        "set it right, for instance with `timedatectl set-ntp true`, or tell the run's owner if it is right already"
    )
