"""The expert that is there now, taken as a joiner takes a block: from one live replica which a second corroborates."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import torch

from common.tasks import within
from node.averaging.joining import JoinConfig, fetch_replica
from node.limits.limits import MIN_BYTES_PER_S
from node.model.experts.block import new_block
from node.model.experts.state import block_state
from node.model.replica_state import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.view import Replica
    from node.averaging.joining import Downloader
    from node.model.expert_file import ExpertId, Weights
    from protocol.manifest import Manifest

FETCH_S = 30.0
"""The time for all but the bytes, which come as slowly as a host's owner may let them."""

MAX_COPIES = 3
"""The most copies of a block, with its moments, that are fetched: the first and its witnesses."""


async def fetch_expert(
    client: Downloader, replicas: Sequence[Replica], place: ExpertId, manifest: Manifest
) -> tuple[Weights, int]:
    """Its weights, and the version of its block. Raises UnavailableError, DeadlineError."""
    block_id = place.block(manifest.model)
    template = await asyncio.to_thread(new_block, manifest, block_id, torch.device("cpu"))
    state = block_state(template)
    config = JoinConfig(max_distance=manifest.averaging.clip_radius, timeout_s=FETCH_S / 2)
    wanted = schema(state)
    limit_s = FETCH_S + MAX_COPIES * sum(t.nbytes for t in state.named().values()) / MIN_BYTES_PER_S
    async with within(limit_s, f"the download of block {block_id}"):
        state = await fetch_replica(client, replicas, wanted, config, random.Random())
    row = place.row(manifest.model)
    return {name: tensor[row].clone() for name, tensor in state.params.items()}, state.version
