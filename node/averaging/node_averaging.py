"""Averaging as one node runs it: its replicas, the service that answers exchanges, the client and loop that begin them.

Hosts put their blocks into `replicas`, trainers their trunk; the rest is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from node.averaging.averager import Averager, AveragerConfig
from node.averaging.client import AveragingClient
from node.averaging.exchange import ExchangeConfig
from node.averaging.gossip import GossipLimits
from node.averaging.replica_set import ReplicaSet
from node.averaging.service import AveragingService
from node.limits.rate_limits import RateLimits
from protocol.limits import MAX_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from dht.directory import Directory
    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId, Manifest
    from protocol.security import Security


RATE_SHARE = 0.8
"""What of an owner's rate an exchange gets at most: calls go on beside it."""


@dataclass(frozen=True, kw_only=True)
class AveragingOptions:
    """`seed` of this node's choices; `stored` reads a block's checkpoint; `rate_limits` are the owner's."""

    seed: int = 0
    stored: Callable[[BlockId], ReplicaState | None] | None = None
    rate_limits: RateLimits = field(default_factory=RateLimits)


class Averaging:
    """The parts, wired. Belongs to the event loop; `service.handler()` goes into the node's gRPC server."""

    def __init__(
        self,
        manifest: Manifest,
        security: Security,
        directory: Directory,
        events: EventLog,
        options: AveragingOptions | None = None,
    ) -> None:
        options = options or AveragingOptions()
        self.replicas = ReplicaSet()
        config = ExchangeConfig(
            run_id=manifest.run_id,
            peer_id=security.identity.peer_id,
            codec=manifest.averaging.codec,
            dtype=manifest.dtype,
            limits=partial(GossipLimits.from_manifest, manifest),
            max_block_bytes=options.rate_limits.slower_bytes_per_s * MAX_DEADLINE_S * RATE_SHARE,
        )
        self.client = AveragingClient(self.replicas, config, security.caller(), options.rate_limits)
        self.averager = Averager(
            self.replicas,
            self.client,
            directory,
            AveragerConfig(peer_id=config.peer_id, period_s=manifest.averaging.period_s, seed=options.seed),
            events,
        )
        self.service = AveragingService(
            self.replicas,
            config,
            self.averager.on_result,
            stored=options.stored,
            rate_limits=options.rate_limits,
        )

    def start(self) -> None:
        """Begin exchanges with other replicas' holders, until `stop`."""
        self.averager.start()

    async def stop(self) -> None:
        """End the exchanges that this node began, and close its channels; safe without a `start`."""
        await self.averager.stop()
        await self.client.close()
