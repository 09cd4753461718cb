"""Which blocks a host takes: a pure function of what the directory shows. Asked once, when a host starts.

"Needs most" means: fewest live replicas first; ties in an order of the host's own, so that hosts which start together
rarely pick the same blocks.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from protocol.errors import ConfigError
from protocol.manifest import BlockId, all_blocks

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from protocol.manifest import ModelConfig

_RANGE = re.compile(r"(\d{1,9})/(\d{1,9})(?:-(\d{1,9}))?")


def choose_blocks(
    model: ModelConfig, n_replicas: Mapping[BlockId, int], peer_id: str, max_blocks: int, own: Collection[BlockId] = ()
) -> list[BlockId]:
    """At most `max_blocks`: those in `own` (checkpoints of this host) first, then the ones with the fewest replicas."""

    def need(block: BlockId) -> tuple[bool, int, bytes]:
        order = hashlib.sha256(f"{peer_id}/{block}".encode()).digest()
        return block not in own, n_replicas.get(block, 0), order

    return sorted(sorted(all_blocks(model), key=need)[:max_blocks])


def parse_blocks(text: str, model: ModelConfig) -> list[BlockId]:
    """`0/0-3,1/7` as block ids; raises ConfigError naming the part that is wrong."""
    blocks: set[BlockId] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--blocks: {part!r} is not LAYER/BLOCK or LAYER/FIRST-LAST, such as 0/0-3")
        layer, first, last = int(match[1]), int(match[2]), int(match[3] or match[2])
        if layer >= model.n_layers or not first <= last < model.blocks_per_layer:
            raise ConfigError(
                f"--blocks: {part!r} is outside this run's {model.n_layers} layers (from 0) "
                f"of {model.blocks_per_layer} blocks (from 0)"
            )
        blocks.update(BlockId(layer, block) for block in range(first, last + 1))
    return sorted(blocks)
