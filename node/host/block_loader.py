"""Where a host's blocks come from: another replica, a checkpoint, or the run's seed. Part of `block_manager.py`."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING

from node.averaging.joining import JoinConfig, Origin, choose_source, fetch_replica
from node.model.devices import no_capacity_is_an_error
from node.model.experts.block import new_block
from node.model.experts.state import block_from_state, block_state
from node.model.replica_state import schema

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    import torch

    from dht.view import DirectoryView
    from node.averaging.joining import Downloader, Source
    from node.averaging.partial import PartialDownloads
    from node.host.block_store import BlockStore
    from node.model.experts.block import Block
    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId, Manifest

MAX_DOWNLOADS = 2
"""The most downloads at once: each holds a block in memory that is not served yet."""


def source_of(block_id: BlockId, view: DirectoryView, own_id: str, stored: Mapping[BlockId, int]) -> Source:
    """Where peer `own_id`, with checkpoints of these versions `stored`, takes a block from."""
    return choose_source(
        live=[r for r in view.replicas[block_id] if r.peer_id != own_id],
        stored=[r for r in view.others if r.block == block_id and r.state == "stored" and r.peer_id != own_id],
        own_version=stored.get(block_id),
    )


def is_here(source: Source) -> bool:
    """Whether nobody else is needed for it."""
    return source.origin in {Origin.SEED, Origin.OWN_CHECKPOINT}


class BlockLoader:
    """Makes whole blocks on `device`. Raises NoRoomError where its memory does not suffice.

    While downloads are `one_by_one`, none is begun beside another: two that rest for the owner's limits would wait for
    each other until their senders give up.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        store: BlockStore,
        client: Downloader,
        rng: random.Random,
        one_by_one: Callable[[], bool],
    ) -> None:
        self._manifest, self._device, self._store, self._client, self._rng = manifest, device, store, client, rng
        self._join_config = JoinConfig(max_distance=manifest.averaging.clip_radius)
        self._permits, self._turn, self._one_by_one = asyncio.Semaphore(MAX_DOWNLOADS), asyncio.Lock(), one_by_one
        self.downloaded_bytes = 0

    @no_capacity_is_an_error()
    def load(self, block_id: BlockId, source: Source) -> Block:
        """A block that `is_here`, on the calling thread. Raises CheckpointError if its checkpoint cannot be read."""
        if source.origin is Origin.OWN_CHECKPOINT:
            return self._store.load_or_new(block_id)
        return self._new(block_id)

    async def download(self, block_id: BlockId, source: Source, partials: PartialDownloads) -> Block:
        """A block from other peers. Raises KilohiveError if it cannot be had now; `partials` keeps what came of it."""
        template = await asyncio.to_thread(self._new, block_id)
        async with self._permits, self._turn_if_limited():
            wanted = schema(block_state(template))
            state = await fetch_replica(self._client, source.candidates, wanted, self._join_config, self._rng, partials)
        block = await asyncio.to_thread(self._from_state, block_id, state)
        self.downloaded_bytes += sum(t.nbytes for t in state.named().values())
        return block

    def _turn_if_limited(self) -> AbstractAsyncContextManager[None]:
        return self._turn if self._one_by_one() else nullcontext()

    @no_capacity_is_an_error()
    def _new(self, block_id: BlockId) -> Block:
        return new_block(self._manifest, block_id, self._device)

    @no_capacity_is_an_error()
    def _from_state(self, block_id: BlockId, state: ReplicaState) -> Block:
        return block_from_state(self._manifest, block_id, state, self._device)
