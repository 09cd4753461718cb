"""What tests ask a directory's view."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dht.view import DirectoryView
    from protocol.manifest import BlockId


def live_blocks(view: DirectoryView) -> tuple[BlockId, ...]:
    """Blocks with at least one replica."""
    return tuple(block for block, replicas in view.replicas.items() if replicas)
