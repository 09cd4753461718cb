"""Replicas of which only some pieces have come: what a joiner keeps of a download that breaks off, to go on from it.

Whoever is asked next sends the pieces that are missing, as its replica is then, so the whole may be of two moments or
of two replicas. That is right for these reasons. Each weight is that of an honest replica at some moment, so the
mixture x lies no further from the newer state y than the older state z does: where x differs from y it is z, hence
||x - y|| <= ||z - y||. That is as far as training has moved the replica meanwhile, or as two replicas lie apart, which
averaging mends each period, and for a joiner before it serves. Moments forget what they were within tens of steps, and
are cut, once they are whole, to the bound that Adam's arithmetic sets them. Step counts and version are the newer ones.
What came more than KEEP_S ago is not used.

A mixture must not hide a forgery: `joining.py` says on whose word it is believed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from node.averaging.pieces import TensorBuffers, cut, wanted_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.averaging.pieces import Slot
    from node.model.replica_state import TensorSchema
    from protocol.manifest import BlockId

    Tell = Callable[[BlockId, int, int], None]
    """Hears of each piece of a block: the bytes that are here, of how many."""

KEEP_S = 600.0
"""What came longer ago is forgotten: training has gone too far since."""

MAX_KEPT = 2
"""Downloads that are kept: each holds memory for a block."""


class PartialReplica:
    """The first `taken` pieces of a block, and who has sent some of them (`senders`)."""

    def __init__(
        self, block_id: BlockId, wanted: Sequence[TensorSchema], *, params_only: bool = False, tell: Tell | None = None
    ) -> None:
        self.block_id, self.params_only, self._tell = block_id, params_only, tell
        self.tensors = wanted_tensors(wanted, params_only=params_only)
        self.slots = cut(self.tensors)
        self.store = TensorBuffers(self.tensors)
        self.n_rows = wanted[0].shape[0]
        self.n_bytes = sum(map(_bytes_of, self.slots))
        self.begun_s = time.monotonic()
        self.clear()

    def __str__(self) -> str:
        return f"{self.taken_bytes / 1e6:.1f} of {self.n_bytes / 1e6:.1f} MB are here"

    def clear(self) -> None:
        """Begin anew."""
        self.taken, self.taken_bytes = 0, 0
        self.senders: set[str] = set()

    def took(self, slot: Slot, sender: str) -> None:
        """The next piece is in the store."""
        self.senders.add(sender)
        self.taken += 1
        self.taken_bytes += _bytes_of(slot)
        if self._tell and not self.params_only:
            self._tell(self.block_id, self.taken_bytes, self.n_bytes)


class PartialDownloads:
    """What is kept of downloads that broke off, whole replicas only; `tell` hears of every piece. Bounded."""

    def __init__(self, tell: Tell | None = None) -> None:
        self._tell = tell
        self._kept: dict[BlockId, PartialReplica] = {}

    def begin(self, block_id: BlockId, wanted: Sequence[TensorSchema]) -> PartialReplica:
        """What is kept of a block, and then no longer kept here, or nothing of it yet."""
        kept = self._kept.pop(block_id, None)
        if kept and kept.begun_s > time.monotonic() - KEEP_S and kept.tensors == sorted(wanted):
            return kept
        return self.anew(block_id, wanted)

    def anew(self, block_id: BlockId, wanted: Sequence[TensorSchema], *, params_only: bool = False) -> PartialReplica:
        """Nothing of a block yet."""
        return PartialReplica(block_id, wanted, params_only=params_only, tell=self._tell)

    def keep(self, partial: PartialReplica) -> None:
        """Keep it until it is asked for, unless nothing of it has come."""
        if partial.taken:
            self._kept[partial.block_id] = partial
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]


def _bytes_of(slot: Slot) -> int:
    return (slot.end - slot.offset) * slot.dtype.itemsize
