"""Which host gets which blocks in a local swarm, and lists of blocks as people read them. Pure functions."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from protocol.errors import ConfigError
from protocol.manifest import BlockId, all_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protocol.manifest import ModelConfig


def split_blocks(model: ModelConfig, n_hosts: int) -> list[list[BlockId]]:
    """Every block to exactly one host; hosts differ by at most one block, in all and within each layer.

    Raises ConfigError if there are fewer blocks than hosts.
    """
    blocks = sorted(all_blocks(model), key=lambda block: (block.block, block.layer))
    if n_hosts > len(blocks):
        raise ConfigError(
            f"--hosts {n_hosts}: there are only {len(blocks)} blocks; use fewer hosts or smaller --experts-per-block"
        )
    bounds = [len(blocks) * i // n_hosts for i in range(n_hosts + 1)]
    return [sorted(blocks[start:end]) for start, end in pairwise(bounds)]


def block_list_text(blocks: Iterable[BlockId]) -> str:
    """`blocks` as `host --blocks` takes them: 0/0-3,1/7."""
    ordered = enumerate(sorted(blocks))
    runs = [list(run) for _, run in groupby(ordered, key=lambda at: (at[1].layer, at[1].block - at[0]))]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(str(first) if first == last else f"{first}-{last.block}" for first, last in ends)
