"""Placement for one host: the pure functions of `placement.py` with what the host remembers and draws around them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from common.errors import UnavailableError
from node.averaging.joining import Origin
from node.host.block_loader import source_of
from node.host.placement import PlacementPlan, check_delay_s, joining_since, overdue, placement_view, plan

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Collection, Sequence

    from dht.directory import Directory
    from dht.view import DirectoryView
    from node.host.held_blocks import HeldBlocks
    from node.host.placement import Joiner, PlacementConfig
    from protocol.manifest import BlockId


class PlacementPlanner:
    """Which blocks host `peer_id` wants; with `fixed` blocks these and no others. Carries nothing out.

    `unreachable` names peers that could not be dialled of late.
    """

    def __init__(
        self,
        directory: Directory,
        unreachable: Callable[[], frozenset[str]],
        peer_id: str,
        config: PlacementConfig,
        rng: random.Random,
        fixed: Sequence[BlockId] = (),
    ) -> None:
        self._directory, self._unreachable, self._peer_id = directory, unreachable, peer_id
        self._config, self._rng, self._fixed = config, rng, tuple(fixed)
        self._joiners: dict[Joiner, float] = {}
        self._looked_s = directory.snapshot().taken_s

    @property
    def max_blocks(self) -> int:
        """Blocks that this host may hold now."""
        return self._config.max_blocks

    def hold_at_most(self, n_blocks: int) -> None:
        """Plan for so many blocks from now on."""
        self._config = replace(self._config, max_blocks=n_blocks)

    def check_delay_s(self) -> float:
        """Seconds until the next check."""
        return check_delay_s(self._config, self._rng)

    async def refresh(self) -> None:
        """Read the directory now, if the DHT answers: it may show who was there before a pause."""
        with suppress(UnavailableError):
            await self._directory.refresh_now()
        self._looked_s = self._directory.snapshot().taken_s

    def first(self, held: HeldBlocks) -> Sequence[BlockId]:
        """The fixed blocks, or those that the swarm needs most, most needed first, and that there is room for."""
        return self._without_too_early(self._fixed[: self.max_blocks] or self._plan(held).take, held)

    def moves(self, held: HeldBlocks) -> PlacementPlan:
        """What to take and to drop at a check; of fixed blocks those that could not be had yet."""
        planned = self._plan(held) if not self._fixed else self._missing(held)
        take = self._without_too_early(planned.take, held)
        return PlacementPlan(take=take, drop=planned.drop if take or not planned.take else ())

    def _missing(self, held: HeldBlocks) -> PlacementPlan:
        free = max(0, self.max_blocks - len(held.blocks))
        return PlacementPlan(take=tuple(block_id for block_id in self._fixed if block_id not in held.blocks)[:free])

    def _without_too_early(self, wanted: Sequence[BlockId], held: HeldBlocks) -> tuple[BlockId, ...]:
        """Leave those to a later check that would begin anew, while a host that has them may be about to start.

        When all hosts of a run start again, each finds nobody who has what others have on their disks.
        """
        view = self._directory.snapshot()
        if view.taken_s - self._looked_s >= self._config.anew_after_s or not _has_trained(view, held):
            return tuple(wanted)
        origins = {block_id: source_of(block_id, view, self._peer_id, held.stored).origin for block_id in wanted}
        return tuple(block_id for block_id, origin in origins.items() if origin is not Origin.SEED)

    def spare(self, own: Collection[BlockId]) -> BlockId:
        """The block of one's `own` that most others serve, which is not wanted here any more."""
        (spared,) = self.most_served(own, 1)
        self._fixed = tuple(block_id for block_id in self._fixed if block_id != spared)
        return spared

    def most_served(self, own: Collection[BlockId], n_blocks: int) -> list[BlockId]:
        """So many blocks of one's `own`, those first that most others serve."""
        view = self._directory.snapshot()
        by_replicas = sorted(own, key=lambda block_id: (len(view.replicas[block_id]), block_id), reverse=True)
        return by_replicas[:n_blocks]

    def _plan(self, held: HeldBlocks) -> PlacementPlan:
        # A peer that cannot be reached may be dead long before its records expire. Counting it out only adds replicas.
        directory = self._directory.snapshot(with_avoided=True).without(self._unreachable())
        self._joiners = joining_since(directory, self._joiners)
        ignored = overdue(self._joiners, directory.taken_s, self._config)
        view = placement_view(directory, self._peer_id, ignored)
        return plan(view, held.ages_s(), held.stored, self._config, self._rng)


def _has_trained(view: DirectoryView, held: HeldBlocks) -> bool:
    """Whether there are experts that have learnt something, here or with others."""
    versions = chain(held.stored.values(), (of.version for of in chain(view.others, *view.replicas.values())))
    return any(versions) or any(peer.run_tokens for peer in view.peers if peer.role == "trainer")
