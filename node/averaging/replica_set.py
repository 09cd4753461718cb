"""This node's replicas as averaging sees them: which there are, which exchange holds which, what each partner has seen.

A block takes part in one exchange at a time. Belongs to the event loop; nothing here waits but `schema_hashes`.

Shapes: R rows of a replica.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from common.errors import NotHostedError
from node.model.replica_state import schema, schema_hash

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from node.averaging.replica import AveragedReplica
    from protocol.manifest import BlockId

MOMENTS_EVERY = 8
"""Moments are two thirds of a replica's bytes, and forget by themselves within tens of steps: they go with the first
exchange of a block with a partner, and then with every eighth."""

MAX_PARTNERS = 128
"""The most partners remembered for each block; the one met longest ago then counts as never met."""


@dataclass(eq=False, kw_only=True)
class Claim:
    """One exchange's hold on blocks.

    While it is `pending`, offered by this node and not answered yet, an offer of a dialler with a smaller peer id takes
    blocks away: of two exchanges that cross, both sides let the same one go on.
    """

    dialler: str
    pending: bool


class _Met(NamedTuple):
    """One partner: `learnt_R` at the last exchange, and exchanges since moments went along."""

    learnt_R: torch.Tensor
    without_moments: int


@dataclass(eq=False)
class _Held:
    replica: AveragedReplica
    schema_hash: bytes = b""
    n_bytes: int = 0
    met: OrderedDict[str, _Met] = field(default_factory=OrderedDict)


class ReplicaSet:
    """Replicas by block."""

    def __init__(self) -> None:
        self._held: dict[BlockId, _Held] = {}
        self._claims: dict[BlockId, Claim] = {}
        self._moved: defaultdict[BlockId, float] = defaultdict(float)

    def add(self, replica: AveragedReplica) -> None:
        """Average this replica from now on; it replaces one of the same block."""
        self._held[replica.id] = _Held(replica)

    def remove(self, block_id: BlockId) -> None:
        """Average it no more; an exchange of it that goes on is the replica's to refuse."""
        self._held.pop(block_id, None)

    def get(self, block_id: BlockId) -> AveragedReplica | None:
        """The replica of a block, if it is here."""
        held = self._held.get(block_id)
        return held.replica if held else None

    def ids(self) -> tuple[BlockId, ...]:
        """Blocks that are averaged here, in order."""
        return tuple(sorted(self._held))

    async def schema_hashes(self, block_ids: Iterable[BlockId]) -> dict[BlockId, bytes]:
        """Return the hash of each block's schema, which never changes; empty for a block that is not here."""
        wanted = list(block_ids)
        return dict(zip(wanted, await asyncio.gather(*map(self._schema_hash, wanted)), strict=True))

    def n_bytes(self, block_id: BlockId) -> int:
        """Return the bytes of a block's tensors; 0 if it is not held, or its schema's hash was never asked for."""
        held = self._held.get(block_id)
        return held.n_bytes if held else 0

    def claim(self, block_id: BlockId, claim: Claim) -> bool:
        """Hold a block for an exchange, unless another one does; True too if `claim` holds it already."""
        holder = self._claims.get(block_id)
        if block_id not in self._held or (holder not in {None, claim} and not _gives_way(holder, claim)):
            return False
        self._claims[block_id] = claim
        return True

    def release(self, block_id: BlockId, claim: Claim) -> None:
        """End a hold; nothing happens if another exchange has the block by now."""
        if self._claims.get(block_id) is claim:
            del self._claims[block_id]

    def release_all(self, claim: Claim) -> None:
        """End every hold of an exchange."""
        self._claims = {block_id: holder for block_id, holder in self._claims.items() if holder is not claim}

    def learnt_before(self, block_id: BlockId, partner: str) -> torch.Tensor | None:
        """What `learnt_R` was at the last exchange with this partner; None before the first."""
        met = self._met(block_id, partner)
        return met.learnt_R if met else None

    def moments_due(self, block_id: BlockId, partner: str) -> bool:
        """Whether the next exchange with this partner is to carry moments."""
        met = self._met(block_id, partner)
        return met is None or met.without_moments >= MOMENTS_EVERY - 1

    def exchanged(
        self, replica: AveragedReplica, partner: str, learnt_R: torch.Tensor, *, weights_only: bool = False
    ) -> None:
        """An exchange with a partner has moved the replica from a snapshot with this `learnt_R`."""
        held = self._held.get(replica.id)
        if held is None or held.replica is not replica:
            return
        before = held.met.get(partner)
        held.met[partner] = _Met(learnt_R, (before.without_moments if before else 0) + 1 if weights_only else 0)
        held.met.move_to_end(partner)
        if len(held.met) > MAX_PARTNERS:
            held.met.popitem(last=False)

    def moved(self, block_id: BlockId, divergence: float) -> float:
        """Count an exchange that met a partner so far away; how far all of this block's exchanges have moved it.

        To be called while the exchange still holds the block: several go on at once, and end in another order.
        """
        # Clipped moves are shorter; a sum of any numbers would lose small ones.
        self._moved[block_id] += min(divergence, 1.0)
        return self._moved[block_id]

    def _met(self, block_id: BlockId, partner: str) -> _Met | None:
        held = self._held.get(block_id)
        return held.met.get(partner) if held else None

    async def _schema_hash(self, block_id: BlockId) -> bytes:
        held = self._held.get(block_id)
        if held is None:
            return b""
        if not held.schema_hash:
            try:
                tensors = await asyncio.wrap_future(held.replica.look(schema))
            except NotHostedError:
                return b""
            held.schema_hash = schema_hash(tensors)
            held.n_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
        return held.schema_hash


def _gives_way(holder: Claim | None, claim: Claim) -> bool:
    return holder is None or (holder.pending and claim.dialler < holder.dialler)
