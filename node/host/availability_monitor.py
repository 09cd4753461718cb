"""Looks, again and again, whether the owner's conditions for working hold: the hours, an idle machine, no sleep."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from node.host.availability import Reason
from node.host.idle import SAMPLE_S, IdleJudge, MachineUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.host.availability import Availability
    from node.limits.limits import Limits
    from node.limits.process_usage import ProcessUse

LOOK_S = 1.0


class AvailabilityMonitor:
    """Reports the schedule and others who need the machine to `availability`, and has it notice a sleep."""

    def __init__(
        self,
        availability: Availability,
        limits: Limits,
        use: ProcessUse,
        local_time: Callable[[], time.struct_time] = time.localtime,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._availability, self._schedule, self._local_time, self._clock = (
            availability,
            limits.schedule,
            local_time,
            clock,
        )
        self._idle = IdleJudge(clock()) if limits.only_when_idle else None
        self._machine = MachineUse(use)
        self._sampled_s = clock()
        self.look()

    async def watch(self) -> None:
        """Check the conditions again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check the conditions once."""
        self._availability.look()
        if self._schedule is not None:
            self._availability.tell(Reason.SCHEDULE, holds=not self._schedule.allows(self._local_time()))
        if self._idle is not None:
            self._availability.tell(Reason.IN_USE, holds=self._in_use(self._idle))

    def _in_use(self, idle: IdleJudge) -> bool:
        now_s = self._clock()
        if now_s - self._sampled_s < SAMPLE_S:
            return idle.in_use
        self._sampled_s = now_s
        return idle.hear(self._machine.sample(), now_s)
