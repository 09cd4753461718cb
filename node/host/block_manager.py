"""Which blocks a host holds, over its life: taken from a replica, a checkpoint or the run's seed; given up; announced.

A block is announced as `joining` while it is on its way, as `serving` once it is whole and has caught up by one
exchange, as `stored` when it is given up and soon only its checkpoint is left here. Nothing is served before it is
whole.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.errors import DrainingError, KilohiveError, NoRoomError, UnavailableError
from common.tasks import until_stopped
from node.averaging.joining import JoinConfig, Origin, choose_source, fetch_replica
from node.host.placement import (
    PlacementConfig,
    PlacementPlan,
    check_delay_s,
    joining_since,
    overdue,
    placement_view,
    plan,
)
from node.host.serving.block_replica import BlockReplica
from node.model.devices import no_capacity_is_an_error
from node.model.experts.block import new_block
from node.model.experts.state import block_from_state, block_state
from node.model.replica_state import schema
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import torch

    from common.events import EventLog
    from dht.announcer import Announcer
    from dht.directory import Directory
    from node.averaging.joining import Source
    from node.averaging.node_averaging import Averaging
    from node.host.block_store import BlockStore
    from node.host.placement import Joiner
    from node.host.serving.runtime import Runtime
    from node.model.experts.block import Block
    from node.model.replica_state import ReplicaState
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

MAX_DOWNLOADS = 2
"""At once: each holds a block in memory that is not served yet."""

CATCH_UP_TRIES = 3
WITHDRAW_GRACE_S = 5.0
"""A block that is given up is served for this long after its record says so: trainers look every 2 s."""


@dataclass(frozen=True, kw_only=True)
class BlockManagerParts:
    """What a keeper works with; `clock` counts seconds, `pausing` is set while this host takes no blocks."""

    manifest: Manifest
    peer_id: str
    directory: Directory
    runtime: Runtime
    averaging: Averaging
    store: BlockStore
    events: EventLog
    device: torch.device
    clock: Callable[[], float]
    pausing: asyncio.Event
    max_downloads: int = MAX_DOWNLOADS


class BlockManager:
    """Takes and gives up blocks. Belongs to the event loop; `announcer` is set before the first `take`.

    With `fixed` blocks it holds these and no others, and tries again for those that it could not have yet.
    """

    announcer: Announcer

    def __init__(self, parts: BlockManagerParts, placement: PlacementConfig, fixed: Sequence[BlockId] = ()) -> None:
        self._parts, self._placement, self._fixed = parts, placement, tuple(fixed)
        self._rng = random.Random(parts.peer_id)
        self._since: dict[BlockId, float] = {}
        self._joiners: dict[Joiner, float] = {}
        self._leaving: set[BlockId] = set()
        self._letting_go = asyncio.Lock()
        self._deciding = asyncio.Lock()
        self._told_last = False
        self._join_config = JoinConfig(max_distance=parts.manifest.averaging.clip_radius)
        self.joining: set[BlockId] = set()
        self.downloaded_bytes = 0
        self.stored: dict[BlockId, int] = {}

    @property
    def max_blocks(self) -> int:
        """Blocks that this host may hold now."""
        return self._placement.max_blocks

    @property
    def given_up(self) -> dict[BlockId, int]:
        """Versions of blocks that can be downloaded here and are not served, or not for long."""
        going = {block_id: block.version for block_id, block in self._parts.runtime.blocks.items()}
        return {**self.stored, **{block_id: going[block_id] for block_id in self._leaving & going.keys()}}

    @property
    def serving(self) -> dict[BlockId, Block]:
        """Blocks to announce as serving: whole, caught up, not given up."""
        hidden = self.joining | self._leaving
        return {block_id: block for block_id, block in self._parts.runtime.blocks.items() if block_id not in hidden}

    async def take_first(self) -> None:
        """The fixed blocks, or those that the swarm needs most, most needed first, and that there is room for.

        A recheck that takes blocks already is waited for: they are here in the end, whoever took them.
        """
        async with self._deciding:
            await self.take(self._fixed[: self.max_blocks] or self._plan().take)

    async def take(self, block_ids: Iterable[BlockId]) -> None:
        """Hold these blocks too, the first of them first. One that cannot be had now is logged and left out.

        Where the device has no room for all of them, the host holds fewer from then on.

        Raises CheckpointError if one of this host's own checkpoints cannot be read, NoRoomError if no block fits.
        """
        wanted = [block_id for block_id in dict.fromkeys(block_ids) if block_id not in self._parts.runtime.blocks]
        self.joining |= set(wanted)
        here, elsewhere = self._by_place(wanted)
        try:
            for block_id, source in here:
                await self._add(await asyncio.to_thread(self._load, block_id, source))
                self.joining.discard(block_id)
            if elsewhere:
                await self._download_all(elsewhere)
        except NoRoomError as error:
            self.hold_at_most(len(self._parts.runtime.blocks), str(error))
        finally:
            self.joining -= set(wanted)

    async def give_up(self, block_ids: Collection[BlockId], grace_s: float) -> None:
        """Say so, serve on for `grace_s` until nobody asks any more, save, then let them go."""
        self._leaving |= set(block_ids)
        try:
            await self.announce()
            await asyncio.sleep(grace_s)
            # What has left the runtime must get to the disk, whoever loses patience here.
            await asyncio.shield(self._let_go(tuple(block_ids)))
        finally:
            self._leaving -= set(block_ids)

    async def give_up_one(self, reason: str) -> None:
        """Hold a block less from now on, for want of memory; the last one stays."""
        own, view = self.serving, self._parts.directory.snapshot()
        if len(own) < 2:  # noqa: PLR2004 - one would be none
            level = logging.DEBUG if self._told_last else logging.WARNING  # once, not at every look
            logger.log(level, "This host has too little memory for its last block: %s", reason)
            self._told_last = True
            return
        spared = max(own, key=lambda block_id: (len(view.replicas[block_id]), block_id))
        self._fixed = tuple(block_id for block_id in self._fixed if block_id != spared)
        self.hold_at_most(len(own) - 1, reason)
        await self.give_up([spared], WITHDRAW_GRACE_S)

    def hold_at_most(self, n_blocks: int, reason: str) -> None:
        """From now on; raises NoRoomError if that is none."""
        if n_blocks < 1:
            raise NoRoomError(f"there is no room for a single block: {reason}")
        self._placement = replace(self._placement, max_blocks=n_blocks)
        logger.warning("This host holds %d blocks at most from now on: %s", n_blocks, reason)
        self._parts.events.emit("fewer_blocks", max_blocks=n_blocks, reason=reason)

    async def recheck_forever(self) -> None:
        """Look again and again which blocks the swarm needs, and follow."""
        while True:
            await asyncio.sleep(check_delay_s(self._placement, self._rng))
            try:
                if not self._parts.pausing.is_set():
                    await until_stopped(self.recheck(), self._parts.pausing)
            except DrainingError:
                continue
            except KilohiveError as error:
                logger.warning("This host's blocks stay as they are for now: %s", error)

    async def recheck(self) -> None:
        """Take what the swarm needs and there is room for; move a block if that is worth the transfer."""
        async with self._deciding:
            await self._recheck()

    async def _recheck(self) -> None:
        hosted = self._parts.runtime.blocks
        free = max(0, self.max_blocks - len(hosted))
        missing = tuple(block_id for block_id in self._fixed if block_id not in hosted)[:free]
        moves = PlacementPlan(take=missing) if self._fixed else self._plan()
        if not (moves.take or moves.drop):
            return
        self._parts.events.emit("placement", take=list(map(str, moves.take)), drop=list(map(str, moves.drop)))
        self.joining |= set(moves.take)  # announced with the drop, so that others leave these to this host
        try:
            if moves.drop:
                await self.give_up(moves.drop, WITHDRAW_GRACE_S)
            await self.take(moves.take)
        finally:
            self.joining -= set(moves.take)
        await self.announce()

    def _plan(self) -> PlacementPlan:
        parts = self._parts
        # Who cannot be reached may be dead long before its records expire. Counting it out only adds replicas.
        directory = parts.directory.snapshot(with_avoided=True).without(parts.averaging.averager.unreachable())
        self._joiners = joining_since(directory, self._joiners)
        ignored = overdue(self._joiners, directory.taken_s, self._placement)
        now = parts.clock()
        own = {block_id: now - self._since.get(block_id, now) for block_id in (*parts.runtime.blocks, *self.joining)}
        view = placement_view(directory, parts.peer_id, ignored)
        return plan(view, own, self.stored, self._placement, self._rng)

    def _by_place(
        self, block_ids: Sequence[BlockId]
    ) -> tuple[list[tuple[BlockId, Source]], list[tuple[BlockId, Source]]]:
        view, own = self._parts.directory.snapshot(), self._parts.peer_id
        sources = [
            (
                block_id,
                choose_source(
                    live=[r for r in view.replicas[block_id] if r.peer_id != own],
                    stored=[r for r in view.others if r.block == block_id and r.state == "stored" and r.peer_id != own],
                    own_version=self.stored.get(block_id),
                ),
            )
            for block_id in block_ids
        ]
        here = [item for item in sources if item[1].origin in {Origin.SEED, Origin.OWN_CHECKPOINT}]
        return here, [item for item in sources if item not in here]

    @no_capacity_is_an_error()
    def _load(self, block_id: BlockId, source: Source) -> Block:
        parts = self._parts
        if source.origin is Origin.OWN_CHECKPOINT:
            return parts.store.load_or_new(block_id)
        return self._new(block_id)

    async def _let_go(self, block_ids: Sequence[BlockId]) -> None:
        parts = self._parts
        async with self._letting_go:
            for block_id in block_ids:
                if block_id not in parts.runtime.blocks:
                    continue
                parts.averaging.replicas.remove(block_id)
                removed = await asyncio.wrap_future(parts.runtime.remove_block(block_id))
                await asyncio.to_thread(parts.store.write, block_id, *parts.store.copy(removed))
                self.stored[block_id] = removed.version
                self._since.pop(block_id, None)

    async def _download_all(self, wanted: Sequence[tuple[BlockId, Source]]) -> None:
        await self.announce()
        permits = asyncio.Semaphore(self._parts.max_downloads)
        downloads = (self._download(block_id, source, permits) for block_id, source in wanted)
        got = await asyncio.gather(*downloads, return_exceptions=True)
        await self.catch_up([block_id for block_id in got if isinstance(block_id, BlockId)])
        for failure in got:
            if isinstance(failure, BaseException):
                raise failure

    async def _download(self, block_id: BlockId, source: Source, permits: asyncio.Semaphore) -> BlockId | None:
        parts = self._parts
        started = parts.clock()
        try:
            template = await asyncio.to_thread(self._new, block_id)
            async with permits:
                state = await fetch_replica(
                    parts.averaging.client,
                    source.candidates,
                    schema(block_state(template)),
                    self._join_config,
                    self._rng,
                )
            block = await asyncio.to_thread(self._from_state, block_id, state)
        except NoRoomError:
            raise
        except KilohiveError as error:
            logger.warning("Block %s is not taken now: %s", block_id, error)
            parts.events.emit("join_failed", block=str(block_id), reason=str(error))
            self.joining.discard(block_id)
            return None
        self.downloaded_bytes += sum(t.nbytes for t in state.named().values())
        await self._add(block)
        seconds = round(parts.clock() - started, 3)
        parts.events.emit(
            "joined", block=str(block_id), version=block.version, source=str(source.origin), seconds=seconds
        )
        return block_id

    @no_capacity_is_an_error()
    def _new(self, block_id: BlockId) -> Block:
        return new_block(self._parts.manifest, block_id, self._parts.device)

    @no_capacity_is_an_error()
    def _from_state(self, block_id: BlockId, state: ReplicaState) -> Block:
        return block_from_state(self._parts.manifest, block_id, state, self._parts.device)

    async def _add(self, block: Block) -> None:
        parts = self._parts
        await asyncio.wrap_future(parts.runtime.add_block(block))
        parts.averaging.replicas.add(BlockReplica(parts.runtime, block.id))
        self._since[block.id] = parts.clock()
        self.stored.pop(block.id, None)

    async def catch_up(self, block_ids: Sequence[BlockId]) -> None:
        """One exchange for each block, so that what was learnt during its download is not missed."""
        left = set(block_ids)
        for _ in range(CATCH_UP_TRIES):
            if not left:
                return
            result = await self._parts.averaging.averager.exchange_once(sorted(left))
            if result is not None:
                left -= {moved.block for moved in result.blocks}

    async def announce(self) -> None:
        """Say now what is held; a DHT that does not answer hears of it later."""
        try:
            await self.announcer.announce_now()
        except UnavailableError as error:
            logger.warning("The DHT does not answer, announcing later: %s", error)
