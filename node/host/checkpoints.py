"""Writes a host's blocks to disk from time to time, and keeps its folder below what the owner allows."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from node.host.events import BlockCheckpointFailedEvent, CheckpointEvent

if TYPE_CHECKING:
    from common.events import EventLog
    from node.host.block_store import BlockStore
    from node.host.held_blocks import HeldBlocks
    from node.host.serving.runtime import Runtime
    from node.model.experts.block import Block
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes checkpoints of the blocks that changed since they were last written. Belongs to the event loop."""

    def __init__(
        self,
        runtime: Runtime,
        store: BlockStore,
        held: HeldBlocks,
        max_disk_bytes: int | None,
        events: EventLog,
    ) -> None:
        self._runtime, self._store, self._held = runtime, store, held
        self._max_disk_bytes, self._events = max_disk_bytes, events
        self._saved: dict[BlockId, int] = {}

    async def save_every(self, seconds: float) -> None:
        """Save every `seconds` seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.save()

    async def save(self) -> None:
        """Write the blocks that changed; a full disk is reported and does not stop the host."""
        started = time.monotonic()
        changed = [block for block in self._runtime.blocks.values() if block.version != self._saved.get(block.id)]
        try:
            for block in changed:
                version = await self._save_block(block)
                self._saved[block.id] = version
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._events.emit(BlockCheckpointFailedEvent(reason=str(error)))
            return
        await self._keep_disk_limit()
        if changed:
            self._events.emit(CheckpointEvent(blocks=len(changed), seconds=round(time.monotonic() - started, 3)))

    async def _save_block(self, block: Block) -> int:
        copy = self._runtime.call(lambda: self._store.copy(block))
        tensors, metadata = await asyncio.wrap_future(copy)
        await asyncio.to_thread(self._store.write, block.id, tensors, metadata)
        return int(metadata["version"])

    async def _keep_disk_limit(self) -> None:
        """Fewer stored blocks; those that are hosted stay."""
        if self._max_disk_bytes is None:
            return
        gone = await asyncio.to_thread(self._store.trim, self._max_disk_bytes, frozenset(self._runtime.blocks))
        for block_id in gone:
            self._held.stored.pop(block_id, None)
