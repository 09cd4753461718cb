"""Which host gets which blocks in a local swarm, and lists of blocks as people read them. Pure functions."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from common.errors import ConfigError
from protocol.manifest import BlockId, all_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protocol.manifest import ModelConfig

MAX_CHARS = 300


def split_blocks(model: ModelConfig, n_hosts: int, n_replicas: int = 1) -> list[list[BlockId]]:
    """Every block to `n_replicas` different hosts; hosts differ by at most one block, in all and within each layer.

    The blocks, one after the other `n_replicas` times, are cut into a piece per host. So two hosts share many blocks or
    none, and one exchange with few partners serves them all: where `n_replicas` divides `n_hosts`, whoever shares a
    block shares every block.

    Raises ConfigError if there are fewer hosts than replicas of a block, or fewer replicas than hosts.
    """
    blocks = sorted(all_blocks(model), key=lambda block: (block.block, block.layer))
    n_places = len(blocks) * n_replicas
    if n_replicas > n_hosts:
        raise ConfigError(f"--replicas {n_replicas}: there are only {n_hosts} hosts, and each holds a block once")
    if n_hosts > n_places:
        raise ConfigError(
            f"--hosts {n_hosts}: there are only {len(blocks)} blocks with --replicas {n_replicas}; "
            "use fewer hosts or smaller --experts-per-block"
        )
    bounds = [n_places * i // n_hosts for i in range(n_hosts + 1)]
    return [sorted(blocks[place % len(blocks)] for place in range(start, end)) for start, end in pairwise(bounds)]


def block_list_text(blocks: Iterable[BlockId]) -> str:
    """`blocks` as `host --blocks` takes them: 0/0-3,1/7."""
    ordered = enumerate(sorted(blocks))
    runs = [list(run) for _, run in groupby(ordered, key=lambda at: (at[1].layer, at[1].block - at[0]))]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(str(first) if first == last else f"{first}-{last.block}" for first, last in ends)


def short_block_list_text(blocks: Iterable[BlockId]) -> str:
    """Return `block_list_text`, cut off behind a comma where it is long."""
    names = block_list_text(blocks)
    return names if len(names) <= MAX_CHARS else names[:MAX_CHARS].rpartition(",")[0] + ", ..."
