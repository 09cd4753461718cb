"""Limits that change while a host works: what is counted, planned and looked at follows at once."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.allocator import keep_little_memory
from node.host.capacity import runtime_config
from node.host.events import LimitsEvent
from node.limits.memory import container_limit, lowest_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from common.events import EventLog
    from node.host.availability_monitor import AvailabilityMonitor
    from node.host.conditions import Condition
    from node.host.memory_watch import MemoryWatch
    from node.host.owner_limits import OwnerLimits
    from node.host.placement_controller import PlacementController
    from node.host.serving.runtime import Runtime
    from node.limits.limits import Limits
    from node.limits.memory import Capacity
    from node.limits.rate_limits import RateLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LimitedParts:
    """What follows the limits. `capacity` says what fits under some; it raises ConfigError if no block does."""

    rate_limits: RateLimits
    memory: MemoryWatch
    runtime: Runtime
    placement: PlacementController
    monitor: AvailabilityMonitor
    capacity: Callable[[Limits], Capacity]
    conditions: Callable[[Limits], Iterable[Condition]]


class LiveLimits:
    """One host's; `room` is what fits now. Belongs to the event loop.

    How many calls are taken at once, and the disk's and the GPU's limits, stay those of the start.
    """

    def __init__(self, owner: OwnerLimits, parts: LimitedParts, room: Capacity, events: EventLog) -> None:
        self._owner, self._parts, self._events = owner, parts, events
        self._changing = asyncio.Lock()
        self.room = room

    async def change(self, changes: object) -> None:
        """Keep other limits, by name, and have all parts follow; blocks that no longer fit are given up first.

        Raises:
            InvalidInputError: a name or a type is wrong, or the command sets that limit. Nothing has changed then.
            ConfigError: a limit cannot be kept, or leaves no room for a block. Nothing has changed then.
            UnavailableError: the disk takes no file. Nothing has changed then.
        """
        async with self._changing:
            kept = self._owner.changed(changes)
            limits = self._owner.limits_with(kept)
            room = self._parts.capacity(limits)
            await asyncio.to_thread(self._owner.keep, kept)
            told = ", ".join(f"{name} = {value}" for name, value in self._owner.settings().items() if value)
            logger.info("The limits that the owner has set are now: %s", told or "none")
            await self._follow(limits, room)

    async def _follow(self, limits: Limits, room: Capacity) -> None:
        parts = self._parts
        parts.rate_limits.follow(limits)
        parts.memory.limit_bytes = lowest_limit(limits.memory_bytes, container_limit())
        parts.monitor.follow(parts.conditions(limits))
        self._events.emit(LimitsEvent(limits=limits.told(), room=room, memory_bytes=parts.memory.used_bytes))
        if room != self.room:
            self.room = room
            if limits.memory_bytes is not None:
                keep_little_memory()
            await asyncio.wrap_future(parts.runtime.follow(runtime_config(self._owner.config, room)))
            await parts.placement.follow(room.max_blocks)
        await asyncio.gather(parts.monitor.look(), parts.memory.look())
