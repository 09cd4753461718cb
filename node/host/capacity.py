"""How many blocks, tokens and cached activations a host has room for, from its owner's limits and the manifest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.errors import ConfigError
from node.host.serving.runtime import RuntimeConfig
from node.limits.memory import Capacity, Need, fit, limit_around, lowest_limit
from node.model.experts.kinds import expert_kind
from protocol.tensors import DTYPES

if TYPE_CHECKING:
    import torch

    from node.host.config import HostConfig
    from node.limits.limits import Limits
    from protocol.manifest import Manifest

WEIGHTS_AND_MOMENTS = 3
FILES_PER_BLOCK = 3
"""A block's checkpoint, the one before, and the next while it is written."""

EVENTS_SHARE = 0.1
"""The share of the disk for all files of the event log."""

WIDE_TENSORS, NARROW_TENSORS = 6, 3
"""Rows that a backward holds for each pair at once: of the tokens' width, and of the experts'."""

PAIR_BYTES = 24


def need_of(manifest: Manifest) -> Need:
    """What a block and a token of this run take."""
    model, size = manifest.model, DTYPES[manifest.dtype].itemsize
    token_bytes = model.d_model * size
    wide, narrow = WIDE_TENSORS * token_bytes, NARROW_TENSORS * model.expert_hidden * size
    pairs = model.experts_per_token
    return Need(
        block_bytes=block_bytes(manifest),
        batch_token_bytes=2 * token_bytes + pairs * (wide + narrow + PAIR_BYTES),
        # Once as a message, once as tensors.
        queue_token_bytes=2 * (token_bytes + pairs * PAIR_BYTES),
    )


def block_bytes(manifest: Manifest) -> int:
    """Return the bytes of one block's weights and moments, in memory as in its checkpoint."""
    model = manifest.model
    per_expert = sum(math.prod(shape) for shape in expert_kind(model.expert_kind).shapes(model).values())
    return WEIGHTS_AND_MOMENTS * per_expert * model.experts_per_block * DTYPES[manifest.dtype].itemsize


def wanted_capacity(config: HostConfig, n_blocks: int) -> Capacity:
    """Without any limit."""
    return Capacity(
        max_blocks=n_blocks,
        keep_inputs_bytes=config.keep_inputs_mb << 20,
        max_batch_tokens=RuntimeConfig.max_batch_tokens,
        max_queue_tokens=config.max_queue_tokens,
    )


def runtime_config(config: HostConfig, capacity: Capacity) -> RuntimeConfig:
    """The runtime's bounds where so much fits."""
    return RuntimeConfig(
        max_queue_tokens=capacity.max_queue_tokens,
        max_batch_tokens=capacity.max_batch_tokens,
        keep_inputs_bytes=capacity.keep_inputs_bytes,
        keep_inputs_s=config.keep_inputs_s,
    )


def capacity_for(
    wanted: Capacity, limits: Limits, manifest: Manifest, device: torch.device, used_bytes: int, container: int | None
) -> Capacity:
    """`wanted`, lowered to what the limits leave; raises ConfigError naming the limit under which no block fits."""
    need = need_of(manifest)
    capacity = fit(wanted, lowest_limit(limits.memory_bytes, container), used_bytes, need, "--max-memory")
    if device.type != "cpu":
        capacity = fit(capacity, limits.gpu_memory_bytes, 0, need, "--max-gpu-memory")
    return _on_disk(capacity, limits.disk_bytes, manifest)


class RoomPlan:
    """What fits on a host that wants to hold `n_blocks`, and took `idle_bytes` of memory before the first of them."""

    def __init__(
        self, config: HostConfig, n_blocks: int, manifest: Manifest, device: torch.device, idle_bytes: int
    ) -> None:
        self._manifest, self._device, self.idle_bytes = manifest, device, idle_bytes
        self.wanted = wanted_capacity(config, n_blocks)

    def under(self, limits: Limits) -> Capacity:
        """What these leave of what is wanted; raises ConfigError naming the limit under which no block fits."""
        around = limit_around(limits.memory_bytes)
        return capacity_for(self.wanted, limits, self._manifest, self._device, self.idle_bytes, around)


def events_bytes(config: HostConfig, limits: Limits) -> int:
    """Return the bytes for one file of the event log; 0 if it may grow without end."""
    if limits.disk_bytes is None:
        return config.event_log_bytes
    most = int(limits.disk_bytes * EVENTS_SHARE / config.event_log_files)
    return min(most, config.event_log_bytes or most)


def _on_disk(capacity: Capacity, limit_bytes: int | None, manifest: Manifest) -> Capacity:
    if limit_bytes is None:
        return capacity
    per_block = FILES_PER_BLOCK * block_bytes(manifest)
    n_blocks = int(limit_bytes * (1 - EVENTS_SHARE) // per_block)
    if n_blocks < 1:
        raise ConfigError(f"--max-disk: is too little for one block, whose checkpoints take {per_block:,} bytes")
    return capacity.with_blocks(min(capacity.max_blocks, n_blocks))
