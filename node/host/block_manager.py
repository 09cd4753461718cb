"""Takes blocks and gives them up, and says so: what `placement_controller.py` decides is carried out here.

A block is announced as `joining` while it is on its way, as `serving` once it is whole and has caught up by one
exchange, as `stored` when it is given up and soon only its checkpoint is left here. Nothing is served before it is
whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from common.errors import KilohiveError, NoRoomError, UnavailableError
from node.averaging.partial import PartialDownloads
from node.averaging.progress import DownloadProgress
from node.host.block_loader import is_here, source_of
from node.host.events import JoinedEvent, JoinFailedEvent
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from common.events import EventLog
    from dht.announcer import Announcer
    from dht.directory import Directory
    from node.averaging.joining import Source
    from node.host.block_loader import BlockLoader
    from node.host.held_blocks import HeldBlocks

logger = logging.getLogger(__name__)


class BlockManager:
    """Changes which blocks are `held`, as host `peer_id` of the swarm. Belongs to the event loop."""

    def __init__(
        self,
        held: HeldBlocks,
        loader: BlockLoader,
        directory: Directory,
        peer_id: str,
        announcer: Announcer,
        events: EventLog,
    ) -> None:
        self.held, self._loader, self._directory, self._peer_id = held, loader, directory, peer_id
        self._announcer, self._events = announcer, events
        self._partials = PartialDownloads(DownloadProgress(events).tell)

    async def take(self, block_ids: Iterable[BlockId]) -> None:
        """Hold these blocks too, the first of them first. One that cannot be had now is logged and left out.

        Raises CheckpointError if one of this host's own checkpoints cannot be read, NoRoomError if the device has no
        room for all of them: those that fit are held then.
        """
        wanted = [block_id for block_id in dict.fromkeys(block_ids) if block_id not in self.held.blocks]
        self.held.joining |= set(wanted)
        view, stored = self._directory.snapshot(), self.held.stored
        sources = [(block_id, source_of(block_id, view, self._peer_id, stored)) for block_id in wanted]
        elsewhere = [item for item in sources if not is_here(item[1])]
        try:
            for block_id, source in sources:
                if is_here(source):
                    await self.held.add(await asyncio.to_thread(self._loader.load, block_id, source))
                    self.held.joining.discard(block_id)
            if elsewhere:
                await self._download_all(elsewhere)
        finally:
            self.held.joining -= set(wanted)

    async def give_up(self, block_ids: Collection[BlockId], grace_s: float) -> None:
        """Say so, serve on for `grace_s` until nobody asks any more, save, then let them go."""
        self.held.leaving |= set(block_ids)
        try:
            await self.announce()
            await asyncio.sleep(grace_s)
            # What has left the runtime must get to the disk, also when the caller is cancelled here.
            await asyncio.shield(self.held.let_go(tuple(block_ids)))
        finally:
            self.held.leaving -= set(block_ids)

    async def announce(self) -> None:
        """Say now what is held; a DHT that does not answer hears of it later."""
        try:
            await self._announcer.announce_now()
        except UnavailableError as error:
            logger.warning("The DHT does not answer, announcing later: %s", error)

    async def _download_all(self, wanted: Sequence[tuple[BlockId, Source]]) -> None:
        await self.announce()
        downloads = (self._download(block_id, source) for block_id, source in wanted)
        got = await asyncio.gather(*downloads, return_exceptions=True)
        await self.held.catch_up([block_id for block_id in got if isinstance(block_id, BlockId)])
        for failure in got:
            if isinstance(failure, BaseException):
                raise failure

    async def _download(self, block_id: BlockId, source: Source) -> BlockId | None:
        started = time.monotonic()
        try:
            block = await self._loader.download(block_id, source, self._partials)
        except NoRoomError:
            raise
        except KilohiveError as error:
            logger.warning("Block %s is not taken now: %s", block_id, error)
            self._events.emit(JoinFailedEvent(block=str(block_id), reason=str(error)))
            self.held.joining.discard(block_id)
            return None
        await self.held.add(block)
        seconds = round(time.monotonic() - started, 3)
        self._events.emit(
            JoinedEvent(block=str(block_id), version=block.version, source=str(source.origin), seconds=seconds)
        )
        return block_id
