"""The blocks that a host serves now. Changed on the runtime's thread, readable from any, without a lock.

Each change replaces the tables by new ones, so that a thread that reads one sees it whole: as it was before, or after.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from common.errors import InvalidInputError, NotHostedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from node.model.experts.block import Block
    from protocol.manifest import BlockId


class HostedBlocks:
    """Blocks by id and by layer, in order."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._replace({block.id: block for block in blocks})

    @property
    def by_id(self) -> Mapping[BlockId, Block]:
        """Every block."""
        return self._by_id

    def layer(self, layer: int) -> tuple[Block, ...]:
        """Blocks of `layer`, in order; none if it has none here."""
        return self._by_layer.get(layer, ())

    def add(self, block: Block) -> None:
        """Serve one more; InvalidInputError if a block of that id is served."""
        if block.id in self._by_id:
            raise InvalidInputError("block", f"{block.id} is hosted here already")
        self._replace({**self._by_id, block.id: block})

    def remove(self, block_id: BlockId) -> Block:
        """Serve one less, and hand it out; raises NotHostedError."""
        left = dict(self._by_id)
        block = left.pop(block_id, None)
        if block is None:
            raise not_hosted(block_id)
        self._replace(left)
        return block

    def check(self, block_ids: Iterable[BlockId]) -> None:
        """Raise NotHostedError for the first that is not here."""
        missing = min((block_id for block_id in block_ids if block_id not in self._by_id), default=None)
        if missing is not None:
            raise not_hosted(missing)

    def version(self, block_ids: Iterable[BlockId]) -> int:
        """Highest version among those that are here; 0 if none is."""
        return max((self._by_id[b].version for b in block_ids if b in self._by_id), default=0)

    def _replace(self, blocks: dict[BlockId, Block]) -> None:
        ordered = {block_id: blocks[block_id] for block_id in sorted(blocks)}
        layers = {block_id.layer for block_id in ordered}
        self._by_layer = {layer: tuple(b for b in ordered.values() if b.id.layer == layer) for layer in layers}
        self._by_id: Mapping[BlockId, Block] = MappingProxyType(ordered)


def not_hosted(block_id: BlockId) -> NotHostedError:
    """Make the error for a block that is gone, or was never here."""
    return NotHostedError("block", f"{block_id} is not hosted here")
