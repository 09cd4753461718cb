"""What a host tells its owner of itself, at one moment: what it serves, what it takes, and what keeps it from working.

More than it announces, and for nobody else: reasons for a pause, limits, the end of its log.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from node.limits.memory import limit_around, lowest_limit
from node.model.devices import device_memory
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    import torch

    from common.log_tail import LogTail
    from node.host.announcement import HostAnnouncement
    from node.host.live_limits import LiveLimits
    from node.host.memory_watch import MemoryWatch
    from node.host.owner_limits import OwnerLimits
    from node.host.serving.service import ExpertService
    from node.limits.process_usage import ProcessUse
    from node.limits.rate_limits import RateLimits

MAX_BLOCKS: Final = 1000
"""Blocks that are told one by one; of more, only the number is told."""


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """Made of the parts that know, most of which announce the host too. Belongs to the event loop."""

    peer_id: str
    device: torch.device
    parts: HostAnnouncement
    service: ExpertService
    use: ProcessUse
    memory: MemoryWatch
    rate_limits: RateLimits
    owner_limits: OwnerLimits
    live_limits: LiveLimits
    log: LogTail

    def told(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        manifest, endpoint = self.parts.manifest, self.parts.node_endpoint
        return {
            "now_s": time.time(),
            "started_s": self.parts.started,
            "run_id": manifest.run_id,
            "peer_id": self.peer_id,
            "software": SOFTWARE,
            "device": str(self.device),
            "endpoint": endpoint.endpoint,
            "reachability": endpoint.state,
            "held": self._held(),
            "work": self._work(),
            "availability": self._availability(),
            "use": self._use(),
            "limits": self._limits(),
            "log": [asdict(line) for line in self.log.lines],
        }

    def _held(self) -> dict[str, Any]:
        held, model = self.parts.held, self.parts.manifest.model
        serving = sorted(held.serving.items())
        experts = {block_id: len(model.block_experts(block_id.block)) for block_id, _ in serving}
        rows = [
            {"block": str(block_id), "version": block.version, "experts": experts[block_id]}
            for block_id, block in serving[:MAX_BLOCKS]
        ]
        return {
            "blocks": rows,
            "serving": len(serving),
            "experts": sum(experts.values()),
            "joining": len(held.joining),
            "stored": len(held.stored),
        }

    def _work(self) -> dict[str, Any]:
        runtime, service = self.parts.runtime, self.service
        return {
            "tokens_per_s": round(runtime.tokens_per_s, 1),
            "tokens": runtime.tokens_total,
            "queue_tokens": runtime.queue_tokens,
            "calls_ok": service.calls_ok,
            "calls_refused": service.calls_refused,
            "staleness": round(runtime.staleness, 2),
        }

    def _availability(self) -> dict[str, Any]:
        availability = self.parts.availability
        return {
            "reasons": [asdict(reason) for reason in availability.held],
            "unknown": list(availability.unknown),
            "until_s": availability.until_s,
            "away": availability.away,
            "leaving": availability.leave.is_set(),
        }

    def _use(self) -> dict[str, Any]:
        return {
            "cpu_s": round(self.use.cpu_s(), 3),
            "memory_bytes": self.memory.used_bytes,
            "device_bytes": device_memory(self.device),
            "sent_bytes": self.rate_limits.sent_bytes,
            "received_bytes": self.rate_limits.received_bytes,
            "exchanged_bytes": self.parts.exchanged_bytes(),
        }

    def _limits(self) -> dict[str, Any]:
        """As they are written, and as numbers. The plan for memory has a bound even where its owner set none."""
        limits = self.owner_limits.limits
        return {
            "settings": self.owner_limits.settings(),
            "fixed": sorted(self.owner_limits.fixed),
            "memory_bytes": lowest_limit(limits.memory_bytes, limit_around(limits.memory_bytes)),
            "own_memory_bytes": limits.memory_bytes,
            "device_bytes": limits.gpu_memory_bytes,
            "up_bytes_per_s": limits.up_bytes_per_s,
            "down_bytes_per_s": limits.down_bytes_per_s,
            "cpu_percent": limits.cpu_percent,
            "max_blocks": self.live_limits.room.max_blocks,
        }
