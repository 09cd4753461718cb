"""The blocks of a host and the state of each: on its way, served and averaged, leaving, or stored on disk only."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from node.host.serving.block_replica import BlockReplica

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from node.averaging.node_averaging import Averaging
    from node.host.block_store import BlockStore
    from node.host.serving.runtime import Runtime
    from node.model.experts.block import Block
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

CATCH_UP_TRIES = 3


class HeldBlocks:
    """Blocks in the runtime, in averaging and on disk, kept in step. Belongs to the event loop.

    `joining` are on their way, `leaving` are given up but still answered; `stored` are the versions of those that only
    their checkpoint is left of. `clock` counts seconds.
    """

    def __init__(self, runtime: Runtime, averaging: Averaging, store: BlockStore, clock: Callable[[], float]) -> None:
        self._runtime, self._averaging, self._store, self._clock = runtime, averaging, store, clock
        self._since: dict[BlockId, float] = {}
        self._letting_go = asyncio.Lock()
        self.joining: set[BlockId] = set()
        self.leaving: set[BlockId] = set()
        self.stored: dict[BlockId, int] = {}

    @property
    def blocks(self) -> Mapping[BlockId, Block]:
        """All that the runtime holds."""
        return self._runtime.blocks

    @property
    def serving(self) -> dict[BlockId, Block]:
        """Blocks to announce as serving: whole, caught up, not given up."""
        hidden = self.joining | self.leaving
        return {block_id: block for block_id, block in self.blocks.items() if block_id not in hidden}

    @property
    def given_up(self) -> dict[BlockId, int]:
        """Versions of blocks that can be downloaded here and are not served, or not for long."""
        going = {block_id: block.version for block_id, block in self.blocks.items()}
        return {**self.stored, **{block_id: going[block_id] for block_id in self.leaving & going.keys()}}

    def ages_s(self) -> dict[BlockId, float]:
        """Seconds that each block has been here; 0 for those that still join."""
        now = self._clock()
        return {block_id: now - self._since.get(block_id, now) for block_id in (*self.blocks, *self.joining)}

    async def add(self, block: Block) -> None:
        """Serve and average a block that is whole."""
        await asyncio.wrap_future(self._runtime.add_block(block))
        self._averaging.replicas.add(BlockReplica(self._runtime, block.id))
        self._since[block.id] = self._clock()
        self.stored.pop(block.id, None)

    async def catch_up(self, block_ids: Sequence[BlockId]) -> None:
        """One exchange for each block, so that what was learnt during its download is not missed."""
        left = set(block_ids)
        for _ in range(CATCH_UP_TRIES):
            if not left:
                return
            result = await self._averaging.averager.exchange_once(sorted(left))
            if result is not None:
                left -= {moved.block for moved in result.blocks}

    async def let_go(self, block_ids: Sequence[BlockId]) -> None:
        """Stop averaging and serving these blocks, and write their checkpoints."""
        async with self._letting_go:
            for block_id in block_ids:
                if block_id in self.blocks:
                    await self._let_go(block_id)

    async def _let_go(self, block_id: BlockId) -> None:
        self._averaging.replicas.remove(block_id)
        removed = await asyncio.wrap_future(self._runtime.remove_block(block_id))
        self._since.pop(block_id, None)
        try:
            await asyncio.to_thread(self._store.write, block_id, *self._store.copy(removed))
            self.stored[block_id] = removed.version
        except CheckpointError as error:
            logger.error("%s; what it learnt since its last checkpoint is lost here", error)  # noqa: TRY400
