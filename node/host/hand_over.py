"""A host that leaves for good: others get what was learnt here, and the blocks that only this host serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from node.host.events import HandedOverEvent, LeavingEvent
from node.host.pause import PAUSE_GRACE_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.events import EventLog
    from dht.directory import Directory
    from node.averaging.averager import Averager
    from node.host.block_manager import BlockManager
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

EXCHANGE_S = 4.0
HAND_OVER_S = 15.0
"""How long a leaving host waits for others to take its last replicas: it is to be gone within 20 s."""

CHECK_S = 1.0


class HandOver:
    """The last thing that host `peer_id` does before it withdraws. Belongs to the event loop."""

    def __init__(
        self, block_manager: BlockManager, averager: Averager, directory: Directory, peer_id: str, events: EventLog
    ) -> None:
        self._block_manager, self._held, self._averager = block_manager, block_manager.held, averager
        self._directory, self._peer_id, self._events = directory, peer_id, events

    async def run(self) -> None:
        """Exchange a last time, give every block up, and wait until others serve them, within HAND_OVER_S."""
        until_s = asyncio.get_running_loop().time() + HAND_OVER_S
        blocks = sorted(self._held.serving)
        self._events.emit(LeavingEvent(blocks=len(blocks)))
        logger.info("Leaving: handing %d blocks over", len(blocks))
        await self._averager.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXCHANGE_S):
                await self._held.catch_up(blocks)
        await self._block_manager.give_up(blocks, PAUSE_GRACE_S)
        left = await self._until_served_elsewhere(blocks, until_s)
        self._events.emit(HandedOverEvent(blocks=len(blocks) - len(left), left=tuple(map(str, left))))
        if left:
            logger.warning("Nobody has taken %s: they come back with this host's folder", ", ".join(map(str, left)))

    async def _until_served_elsewhere(self, blocks: Sequence[BlockId], until_s: float) -> list[BlockId]:
        """Wait, and return the blocks that nobody else serves in the end. Without other hosts it does not wait."""
        loop = asyncio.get_running_loop()
        while True:
            left = [block_id for block_id in blocks if not self._others(block_id)]
            if not left or not self._other_hosts() or loop.time() > until_s:
                return left
            await asyncio.sleep(CHECK_S)

    def _others(self, block_id: BlockId) -> list[str]:
        replicas = self._directory.replicas(block_id)
        return [replica.peer_id for replica in replicas if replica.peer_id != self._peer_id]

    def _other_hosts(self) -> list[str]:
        peers = self._directory.peers()
        others = [peer for peer in peers if peer.role == "host" and peer.peer_id != self._peer_id]
        return [peer.peer_id for peer in others if not peer.paused]
