"""How a node joins a run, and how it is reached. Light: no torch and no hivemind here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from dht.swarm_config import SwarmChoice


@dataclass(frozen=True, kw_only=True)
class SwarmConfig(SwarmChoice):
    """Which swarm to join, and on what terms."""

    join_timeout_s: FileOnly[float] = 60.0
    """Wait this many seconds for the swarm at the start."""
    insecure_local: FileOnly[bool] = False
    """Neither encrypt nor sign calls; on this machine only."""


@dataclass(frozen=True, kw_only=True)
class CallerConfig(SwarmConfig):
    """Which swarm to join, for a command that only calls others and that nobody needs to call."""

    listen: FileOnly[str] = "auto"
    """Listen on this address; auto takes the one that reaches the swarm."""


@dataclass(frozen=True, kw_only=True)
class ReachConfig:
    """How others reach this node. The defaults find what fits, for a node that nobody needs to call first."""

    listen: str = "auto"
    """Listen on this address; auto takes the one that reaches the swarm."""
    announce: str = ""
    """Have others call this address instead, such as a router's."""
    dht_port: int = 0
    """Use this port for the DHT node; 0 takes a free one."""
