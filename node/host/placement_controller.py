"""Decides again and again which blocks a host holds, and has its block manager follow.

The plans come from `placement_planner.py`; here is when they are made, and what a want of memory changes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.errors import DrainingError, KilohiveError, NoRoomError
from common.tasks import repeat, until_stopped
from node.host.events import FewerBlocksEvent, PlacementEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.events import EventLog
    from node.host.block_manager import BlockManager
    from node.host.placement_planner import PlacementPlanner
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

WITHDRAW_GRACE_S = 5.0
"""A block that is given up is served for this long after its record says so: trainers look every 2 s."""


class PlacementController:
    """Belongs to the event loop. `pausing` is set while this host takes no blocks."""

    def __init__(
        self, planner: PlacementPlanner, block_manager: BlockManager, pausing: asyncio.Event, events: EventLog
    ) -> None:
        self._planner, self._block_manager, self._held = planner, block_manager, block_manager.held
        self._pausing, self._events = pausing, events
        self._deciding = asyncio.Lock()
        self._last_block_reported = False

    async def take_first(self) -> None:
        """The fixed blocks, or those that the swarm needs most, as the directory shows it now.

        A recheck that takes blocks already is waited for: they are here in the end, whichever of the two took them.
        """
        await self._planner.refresh()
        async with self._deciding:
            await self._take(self._planner.first(self._held))

    async def recheck_forever(self) -> None:
        """Check again and again which blocks the swarm needs, and follow."""
        await repeat(self._recheck_or_log, self._planner.check_delay_s)

    async def _recheck_or_log(self) -> None:
        try:
            if not self._pausing.is_set():
                await until_stopped(self.recheck(), self._pausing)
        except DrainingError:
            pass
        except KilohiveError as error:
            logger.warning("This host's blocks stay as they are for now: %s", error)

    async def recheck(self) -> None:
        """Take what the swarm needs and there is room for; move a block if that is worth the transfer."""
        async with self._deciding:
            await self._recheck()

    async def give_up_one(self, reason: str) -> None:
        """Hold a block less from now on, for want of memory; the last one stays."""
        own = self._held.serving
        if len(own) < 2:  # noqa: PLR2004 - one would be none
            level = logging.DEBUG if self._last_block_reported else logging.WARNING  # once, not at every check
            logger.log(level, "This host has too little memory for its last block: %s", reason)
            self._last_block_reported = True
            return
        spared = self._planner.spare(own)
        self._hold_at_most(len(own) - 1, reason)
        await self._block_manager.give_up([spared], WITHDRAW_GRACE_S)

    async def follow(self, max_blocks: int) -> None:
        """Hold at most this many blocks from now on, as the owner wants; others are taken at the next check."""
        self._planner.hold_at_most(max_blocks)
        own = self._held.serving
        if len(own) > max_blocks:
            spared = self._planner.most_served(own, len(own) - max_blocks)
            await self._block_manager.give_up(spared, WITHDRAW_GRACE_S)

    async def _recheck(self) -> None:
        moves = self._planner.moves(self._held)
        if not (moves.take or moves.drop):
            return
        self._events.emit(PlacementEvent(take=tuple(map(str, moves.take)), drop=tuple(map(str, moves.drop))))
        self._held.joining |= set(moves.take)  # announced with the drop, so that others leave these to this host
        try:
            if moves.drop:
                await self._block_manager.give_up(moves.drop, WITHDRAW_GRACE_S)
            await self._take(moves.take)
        finally:
            self._held.joining -= set(moves.take)
        await self._block_manager.announce()

    async def _take(self, block_ids: Iterable[BlockId]) -> None:
        """Where the device has no room for all of them, the host holds fewer from then on."""
        try:
            await self._block_manager.take(block_ids)
        except NoRoomError as error:
            self._hold_at_most(len(self._held.blocks), str(error))

    def _hold_at_most(self, n_blocks: int, reason: str) -> None:
        """Hold at most this many blocks from now on; raises NoRoomError if that is none."""
        if n_blocks < 1:
            raise NoRoomError(f"there is no room for a single block: {reason}")
        self._planner.hold_at_most(n_blocks)
        logger.warning("This host holds %d blocks at most from now on: %s", n_blocks, reason)
        self._events.emit(FewerBlocksEvent(max_blocks=n_blocks, reason=reason))
