"""What a host says of itself in the DHT, at one moment: its peer record and one record per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dht.announcer import Announcement
from protocol.announcements import MAX_DIVERGENCE, MAX_STALENESS, BlockRecord, PeerRecord
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.averaging.averager import Averager
    from node.host.availability import Availability
    from node.host.held_blocks import HeldBlocks
    from node.host.serving.runtime import Runtime
    from node.membership.endpoint import NodeEndpoint
    from protocol.announcements import ReplicaState
    from protocol.manifest import BlockId, Manifest

MAX_STORED = 64
"""Checkpoints of blocks that are not hosted here any more, announced for others to download."""


@dataclass(frozen=True, kw_only=True)
class HostAnnouncement:
    """Made of the parts that know; `started` in seconds since 1970."""

    manifest: Manifest
    started: float
    node_endpoint: NodeEndpoint
    runtime: Runtime
    held: HeldBlocks
    averager: Averager
    availability: Availability
    exchanged_bytes: Callable[[], int]

    def describe(self) -> Announcement:
        """Describe the host as it is now. What was held before a sleep is not said to be served."""
        self.availability.look()
        runtime, serving = self.runtime, self._serving()
        peer = PeerRecord(
            role="host",
            endpoint=self.node_endpoint.endpoint,
            software=SOFTWARE,
            started_s=self.started,
            n_blocks=len(serving),
            queue_tokens=runtime.queue_tokens,
            tokens_per_s=runtime.tokens_per_s,
            staleness=min(runtime.staleness, MAX_STALENESS),
            exchanged_bytes=self.exchanged_bytes(),
            reachability=self.node_endpoint.state,
            relay=self.node_endpoint.relay_offer,
            paused=self.availability.pausing.is_set(),
            pause_cause=self.availability.cause,
            paused_since_s=self.availability.since_s,
            paused_until_s=self.availability.until_s or 0.0,
        )
        return Announcement(peer=peer, blocks=tuple(self._records(serving)))

    def _serving(self) -> dict[BlockId, int]:
        if self.availability.has_slept:
            return {}
        return {block_id: block.version for block_id, block in self.held.serving.items()}

    def _records(self, serving: dict[BlockId, int]) -> Iterator[BlockRecord]:
        held = self.held
        yield from (self._record(block_id, version, "serving") for block_id, version in serving.items())
        yield from (self._record(block_id, 0, "joining") for block_id in held.joining - serving.keys())
        left = [item for item in held.given_up.items() if item[0] not in serving and item[0] not in held.joining]
        newest = sorted(left, key=lambda item: -item[1])[:MAX_STORED]
        yield from (self._record(block_id, version, "stored") for block_id, version in newest)

    def _record(self, block_id: BlockId, version: int, state: ReplicaState) -> BlockRecord:
        runtime = self.runtime
        return BlockRecord(
            block=block_id,
            version=version,
            endpoint=self.node_endpoint.endpoint,
            queue_tokens=runtime.queue_tokens,
            tokens_per_s=runtime.tokens_per_s,
            tokens_total=runtime.tokens_total,
            n_experts=len(self.manifest.model.block_experts(block_id.block)),
            state=state,
            divergence=min(self.averager.divergence(block_id), MAX_DIVERGENCE),
        )
