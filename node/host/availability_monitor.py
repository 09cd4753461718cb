"""Looks, again and again, whether the owner's conditions for working hold, and has a sleep noticed.

Each condition is looked at by itself: one whose source hangs keeps no other from being seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from common.tasks import on_thread, repeat
from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from node.host.availability import Availability
    from node.host.conditions import Condition

logger = logging.getLogger(__name__)

SLEEP_LOOK_S = 1.0
TIMEOUT_S = 5.0
"""What a look may take; after that its condition is not known, until the look comes back."""


class AvailabilityMonitor:
    """Reports what the conditions find to `availability`. Belongs to the event loop."""

    def __init__(
        self,
        availability: Availability,
        conditions: Iterable[Condition],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._availability = availability
        self._watches = [_Watch(availability, condition, clock) for condition in conditions]

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat(self._notice_sleep, lambda: SLEEP_LOOK_S))
            for watch in self._watches:
                group.create_task(repeat(watch.look, partial(float, watch.every_s)))

    async def look(self) -> None:
        """Look at every condition once; within TIMEOUT_S."""
        await asyncio.gather(*(watch.look() for watch in self._watches))

    async def _notice_sleep(self) -> None:
        self._availability.look()


class _Watch:
    """One condition, and what is known of it so far."""

    def __init__(self, availability: Availability, condition: Condition, clock: Callable[[], float]) -> None:
        self._availability, self._condition, self._clock = availability, condition, clock
        self.every_s = condition.every_s
        self._looking: Future[Finding] | None = None
        self._against, self._found_s = "", float("-inf")
        self._said = set[str]()

    async def look(self) -> None:
        """Find out, and tell."""
        finding, condition = await self._find(), self._condition
        if finding.against:
            self._against, self._found_s = finding.against, self._clock()
        elif self._clock() - self._found_s >= condition.settle_s:
            self._against = ""
        self._availability.tell(condition.reason, self._against, condition.until_s())
        self._availability.tell_unknown(condition.reason, finding.unknown)
        if finding.unknown and finding.unknown not in self._said:
            self._said.add(finding.unknown)
            logger.warning("On this machine, %s", finding.unknown)

    async def _find(self) -> Finding:
        """What a look finds; the one before may still hang, and there is never more than one at a time."""
        condition = self._condition
        if not condition.blocks:
            return condition.look()
        if self._looking is None or self._looking.done():
            self._looking = on_thread(f"look at {condition.reason}", condition.look)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await asyncio.wrap_future(self._looking)
            except TimeoutError:
                pass
        return Finding(
            unknown=f"the look at {condition.reason} takes longer than {TIMEOUT_S:g} s: it counts as nothing against"
        )
