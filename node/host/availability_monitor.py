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
        self._availability, self._clock = availability, clock
        self._watches = {condition.reason: _Watch(availability, condition, clock) for condition in conditions}
        self._changed = asyncio.Event()

    def follow(self, conditions: Iterable[Condition]) -> None:
        """Look at these from now on. What one that is no longer among them has found counts no longer."""
        before = self._watches
        self._watches = {
            one.reason: _Watch(self._availability, one, self._clock, before.get(one.reason)) for one in conditions
        }
        for reason in before.keys() - self._watches.keys():
            self._availability.tell(reason, "")
            self._availability.tell_unknown(reason, "")
        self._changed.set()

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat(self._notice_sleep, lambda: SLEEP_LOOK_S))
            group.create_task(self._watch_conditions())

    async def _watch_conditions(self) -> None:
        while True:
            self._changed.clear()
            async with asyncio.TaskGroup() as group:
                looks = [repeat(watch.look, partial(float, watch.every_s)) for watch in self._watches.values()]
                tasks = [group.create_task(look) for look in looks]
                await self._changed.wait()
                for task in tasks:
                    task.cancel()

    async def look(self) -> None:
        """Look at every condition once; within TIMEOUT_S."""
        await asyncio.gather(*(watch.look() for watch in self._watches.values()))

    async def _notice_sleep(self) -> None:
        self._availability.look()


class _Watch:
    """One condition, and what is known of it so far, by a watch `before` too."""

    def __init__(
        self,
        availability: Availability,
        condition: Condition,
        clock: Callable[[], float],
        before: _Watch | None = None,
    ) -> None:
        self._availability, self._condition, self._clock = availability, condition, clock
        self.every_s = condition.every_s
        self._looking: Future[Finding] | None = None
        self._against, self._found_s = "", float("-inf")
        self._said = set[str]()
        if before is not None:
            self._looking, self._said = before._looking, before._said  # noqa: SLF001 - one of its own class
            self._against, self._found_s = before._against, before._found_s  # noqa: SLF001 - the same

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
