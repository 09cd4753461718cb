"""A host that pauses, comes back and leaves: what it holds is handed over, and nothing old is served.

A pause gives every block up, as placement does with one: announced as stored, served on for a moment, written, let go.
Coming back takes blocks as at the start: from replicas that have trained on, else from the own checkpoint. So a pause,
a night outside the schedule and a laptop's sleep are one path, and a block is never served that missed something.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.allocator import give_back_memory
from common.errors import DrainingError, KilohiveError, UnavailableError
from common.tasks import until_stopped
from node.host.availability import Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.events import EventLog
    from dht.directory import Directory
    from node.averaging.averager import Averager
    from node.host.availability import Availability
    from node.host.block_manager import BlockManager
    from node.host.serving.runtime import Runtime
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

PAUSE_GRACE_S = 3.0
"""A pausing host answers for so long after its records say so: trainers look every 2 s."""

EXCHANGE_S = 4.0
HAND_OVER_S = 15.0
"""After so long a leaving host no longer waits for others to take its last replicas: it is to be gone within 20 s."""

LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class PauseParts:
    """What a presence works with."""

    peer_id: str
    availability: Availability
    block_manager: BlockManager
    runtime: Runtime
    averager: Averager
    directory: Directory
    events: EventLog


class Pause:
    """Carries out what the duty says. Belongs to the event loop."""

    def __init__(self, parts: PauseParts) -> None:
        self._parts = parts

    async def follow(self) -> None:
        """Pause and come back, until cancelled."""
        availability = self._parts.availability
        while True:
            await availability.pausing.wait()
            await self._pause()
            await availability.working.wait()
            await self._come_back()

    async def hand_over(self) -> None:
        """Before leaving for good: others get what was learnt here, and the blocks that only this host serves."""
        parts = self._parts
        until_s = asyncio.get_running_loop().time() + HAND_OVER_S
        blocks = sorted(parts.block_manager.serving)
        parts.events.emit("leaving", blocks=len(blocks))
        logger.info("Leaving: handing %d blocks over", len(blocks))
        await parts.averager.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXCHANGE_S):
                await parts.block_manager.catch_up(blocks)
        await parts.block_manager.give_up(blocks, PAUSE_GRACE_S)
        left = await self._until_served_elsewhere(blocks, until_s)
        parts.events.emit("handed_over", blocks=len(blocks) - len(left), left=[str(block_id) for block_id in left])
        if left:
            logger.warning("Nobody has taken %s: they come back with this host's folder", ", ".join(map(str, left)))

    async def _pause(self) -> None:
        parts, availability = self._parts, self._parts.availability
        reasons = availability.reasons
        logger.info("Pausing: %s", ", ".join(reasons))
        await parts.averager.stop()
        # After a sleep nobody knows of this host any more.
        await parts.block_manager.give_up(tuple(parts.runtime.blocks), 0.0 if availability.has_slept else PAUSE_GRACE_S)
        availability.away, availability.holding = True, False
        await asyncio.wrap_future(parts.runtime.forget_inputs())
        await asyncio.to_thread(give_back_memory)
        parts.events.emit("paused", reasons=list(reasons), stored=len(parts.block_manager.stored))
        await parts.block_manager.announce()
        availability.tell(Reason.SLEPT, holds=False)

    async def _come_back(self) -> None:
        parts, availability = self._parts, self._parts.availability
        availability.holding = True
        try:
            await until_stopped(self._take(), availability.pausing)
        except DrainingError:
            return
        except KilohiveError as error:
            logger.warning("This host has no blocks for now: %s", error)
        availability.away = False
        parts.averager.start()
        await parts.block_manager.announce()
        parts.events.emit("resumed", blocks=len(parts.block_manager.serving))
        logger.info("Working again, with %d blocks", len(parts.block_manager.serving))

    async def _take(self) -> None:
        # What the directory shows may be as old as the pause.
        with contextlib.suppress(UnavailableError):
            await self._parts.directory.refresh_now()
        await self._parts.block_manager.take_first()

    async def _until_served_elsewhere(self, blocks: Sequence[BlockId], until_s: float) -> list[BlockId]:
        """Those that nobody else serves in the end. Without other hosts there is nobody to wait for."""
        loop = asyncio.get_running_loop()
        while True:
            left = [block_id for block_id in blocks if not self._others(block_id)]
            if not left or not self._other_hosts() or loop.time() > until_s:
                return left
            await asyncio.sleep(LOOK_S)

    def _others(self, block_id: BlockId) -> list[str]:
        replicas = self._parts.directory.replicas(block_id)
        return [replica.peer_id for replica in replicas if replica.peer_id != self._parts.peer_id]

    def _other_hosts(self) -> list[str]:
        peers = self._parts.directory.peers()
        others = [peer for peer in peers if peer.role == "host" and peer.peer_id != self._parts.peer_id]
        return [peer.peer_id for peer in others if not peer.paused]
