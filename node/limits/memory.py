"""How much memory there is for a host's work, and how many blocks, tokens and cached activations fit: pure arithmetic.

The smaller of the owner's limit and the container's holds; an owner who sets none gives half of the machine's memory.
What the node takes before its first block is measured, what a block and a token take is known from the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from common.errors import ConfigError
from common.sizes import size_text

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
SPARE_BYTES = 40_000_000
"""Kept free for what grows by itself: threads' stacks, gRPC's buffers, the directory."""

COPIES_OF_A_BLOCK = 5
"""The most copies at once besides the hosted blocks: an exchange holds up to three, a download two."""

BLOCKS_SHARE = 0.5
KEPT_SHARE, BATCH_SHARE = 0.25, 0.4
"""Shares of what the blocks leave; the rest is for requests that wait, as messages and as tensors."""

MIN_BATCH_TOKENS = 256
MESSAGE_BYTES = 4_000_000
"""The size of a large call, by which the calls at once are counted; larger ones are rare, and the memory watch
sees them."""

MIN_CALLS, MAX_CALLS = 8, 64


@dataclass(frozen=True, kw_only=True)
class Need:
    """The bytes of a block with its moments, of a token in a running batch, and of one that waits."""

    block_bytes: int
    batch_token_bytes: int
    queue_token_bytes: int


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much fits, or how much was asked for where that is less."""

    max_blocks: int
    keep_inputs_bytes: int
    max_batch_tokens: int
    max_queue_tokens: int
    max_calls: int = MAX_CALLS

    def with_blocks(self, max_blocks: int) -> Capacity:
        """Return this capacity with another number of blocks."""
        return replace(self, max_blocks=max_blocks)


def lowest_limit(own_bytes: int | None, container_bytes: int | None) -> int | None:
    """The limit that holds; None if neither is set."""
    return min((limit for limit in (own_bytes, container_bytes) if limit is not None), default=None)


def container_limit(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int | None:
    """What the control group of this process, or one above it, may take; None where no limit is set or told."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    paths = [line.partition("::")[2].strip("/") for line in lines if line.startswith("0::")]
    folders = [root / path for path in paths]
    # Inside a container the path may be the one outside, which is not there: its own group is the root then.
    around = [root, *(parent for folder in folders for parent in (folder, *folder.parents) if root in parent.parents)]
    found = [limit for folder in around if (limit := _limit_in(folder)) is not None]
    return min(found, default=None)


def limit_around(own_bytes: int | None) -> int | None:
    """What a host plans with beside its owner's limit: the container's and, without an owner's, half of the memory."""
    half = int(psutil.virtual_memory().total) // 2
    return lowest_limit(container_limit(), half if own_bytes is None else None)


def fit(wanted: Capacity, limit_bytes: int | None, used_bytes: int, need: Need, flag: str) -> Capacity:
    """`wanted`, lowered to what the limit leaves beside the `used_bytes`; raises ConfigError if no block fits."""
    if limit_bytes is None:
        return wanted
    capacity = limit_bytes - used_bytes - SPARE_BYTES
    transient = COPIES_OF_A_BLOCK * need.block_bytes
    n_blocks = min(wanted.max_blocks, int((capacity * BLOCKS_SHARE - transient) // need.block_bytes))
    if n_blocks < 1:
        least = used_bytes + SPARE_BYTES + (transient + need.block_bytes) / BLOCKS_SHARE
        raise ConfigError(
            f"{flag}: {size_text(limit_bytes)}, of the flag, the container or half of this machine, are too little: "
            f"this node takes {size_text(used_bytes)} before its first block, and needs {size_text(least)} with one; "
            f"{flag} sets the limit"
        )
    left = capacity - transient - n_blocks * need.block_bytes
    queue_share = 1 - KEPT_SHARE - BATCH_SHARE
    return Capacity(
        max_blocks=n_blocks,
        keep_inputs_bytes=min(wanted.keep_inputs_bytes, int(left * KEPT_SHARE)),
        max_batch_tokens=_tokens(wanted.max_batch_tokens, left * BATCH_SHARE, need.batch_token_bytes),
        max_queue_tokens=_tokens(wanted.max_queue_tokens, left * queue_share, need.queue_token_bytes),
        max_calls=min(wanted.max_calls, max(MIN_CALLS, int(left * queue_share // MESSAGE_BYTES))),
    )


def _tokens(wanted: int, n_bytes: float, per_token: int) -> int:
    return min(wanted, max(MIN_BATCH_TOKENS, int(n_bytes // per_token)))


def _limit_in(folder: Path) -> int | None:
    """The newer files and the older ones; "max", or a number as large as all memory, is no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        return int(text) if text.isdecimal() and int(text) < 1 << 60 else None
    return None
