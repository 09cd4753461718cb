"""What a person can set on a lighthouse. Light: no libp2p, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import EventLogConfig
from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from dht.swarm_config import SwarmChoice


@dataclass(frozen=True, kw_only=True)
class LighthouseConfig(SwarmChoice, EventLogConfig):
    """Be a peer that others join a run through and are reached through, and watch the run."""

    state: Path = Path("state/lighthouse")
    """Keep key, swarm.toml and event log in this folder."""
    listen: str = "auto"
    """Listen on this address; auto takes the one that reaches the swarm."""
    port: int = 0
    """Use this TCP port; 0 takes last time's, at the first start a free one."""
    announce: str = ""
    """Have others dial this address, such as a router's."""
    max_connections: FileOnly[int] = 512
    """Hold at most this many connections at a time."""
    max_reservations: int = 128
    """Make this many peers reachable through this relay; 0 offers no relay."""
    max_circuits: int = 64
    """Relay at most this many circuits at a time."""
    max_circuit_mb: FileOnly[int] = 4096
    """Let one circuit carry this many megabytes, both ways together."""
    max_circuit_s: FileOnly[float] = 3600.0
    """Let one circuit last this many seconds."""
    metrics_port: int = 0
    """Serve Prometheus metrics at this port; 0 serves none."""
    metrics_listen: str = "127.0.0.1"
    """Serve Prometheus metrics on this address."""
