"""A host that pauses and comes back: its blocks are given up and taken again, and nothing old is served.

A pause gives every block up, as placement does with one: announced as stored, served on for a moment, written, let go.
Coming back takes blocks as at the start: from replicas that have trained on, else from the own checkpoint. So a pause,
a night outside the schedule, a game and a laptop's sleep are one path, and no block is served that missed something.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.allocator import give_back_memory
from common.errors import DrainingError, KilohiveError
from common.tasks import until_stopped
from node.host.availability import Reason
from node.host.events import PausedEvent, ResumedEvent

if TYPE_CHECKING:
    from common.events import EventLog
    from node.averaging.averager import Averager
    from node.host.availability import Availability
    from node.host.block_manager import BlockManager
    from node.host.placement_controller import PlacementController
    from node.host.serving.runtime import Runtime

logger = logging.getLogger(__name__)

PAUSE_GRACE_S = 3.0
"""A pausing host answers for so long after its records say so: trainers look every 2 s."""


class Pause:
    """Carries out what `availability` says. Belongs to the event loop."""

    def __init__(
        self,
        availability: Availability,
        block_manager: BlockManager,
        placement: PlacementController,
        averager: Averager,
        runtime: Runtime,
        events: EventLog,
    ) -> None:
        self._availability, self._block_manager, self._held = availability, block_manager, block_manager.held
        self._placement, self._averager, self._runtime, self._events = placement, averager, runtime, events

    async def follow(self) -> None:
        """Pause and come back, until cancelled."""
        while True:
            await self._availability.pausing.wait()
            await self._pause()
            await self._availability.working.wait()
            await self._come_back()

    async def _pause(self) -> None:
        availability, reasons = self._availability, self._availability.reasons
        logger.info("Pausing: %s", ", ".join(reasons))
        await self._averager.stop()
        # After a sleep nobody knows of this host any more.
        await self._block_manager.give_up(tuple(self._held.blocks), 0.0 if availability.has_slept else PAUSE_GRACE_S)
        availability.away, availability.holding = True, False
        await asyncio.wrap_future(self._runtime.forget_inputs())
        await asyncio.to_thread(give_back_memory)
        self._events.emit(PausedEvent(reasons=tuple(reasons), stored=len(self._held.stored)))
        await self._block_manager.announce()
        availability.tell(Reason.SLEPT, "")

    async def _come_back(self) -> None:
        availability = self._availability
        availability.holding = True
        try:
            await until_stopped(self._placement.take_first(), availability.pausing)
        except DrainingError:
            return
        except KilohiveError as error:
            logger.warning("This host has no blocks for now: %s", error)
        availability.away = False
        self._averager.start()
        await self._block_manager.announce()
        self._events.emit(ResumedEvent(blocks=len(self._held.serving)))
        logger.info("Working again, with %d blocks", len(self._held.serving))
