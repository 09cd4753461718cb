"""What a person can set on a host, and on the commands that steer one. Light: no torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node.limits.config import LimitsConfig
from node.membership.config import SwarmConfig


@dataclass(frozen=True, kw_only=True)
class HostConfig(LimitsConfig, SwarmConfig):
    """Host blocks of experts for a run."""

    state: Path = Path("state/host")
    """Folder for key, checkpoints, event log."""
    blocks: str = "auto"
    """Blocks to host, such as 0/0-3,1/7 (layer/block); auto takes those that the swarm needs most."""
    max_blocks: int = 8
    """Most blocks to take with --blocks auto."""
    recheck_s: float = 10.0
    """Seconds between looks at which blocks to take, to move or to try again; 0: never."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """CPU threads for the experts' arithmetic."""
    port: int = 0
    """Port of the gRPC server; 0 takes a free one."""
    relay_circuits: int = 16
    """Most calls to carry at once for peers behind a NAT, if others can dial this host; 0: none."""
    metrics_port: int = 0
    """Port for Prometheus metrics; 0 turns them off."""
    max_queue_tokens: int = 65_536
    """Tokens that may wait for this host; more are refused with a retry delay."""
    keep_inputs_mb: int = 256
    """Memory for the inputs kept between a forward and its backward, in MB."""
    keep_inputs_s: float = 120.0
    """Seconds for which a forward's inputs are kept."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Tell the host of a folder on this machine what its owner wants."""

    state: Path = Path("state/host")
    """The host's folder."""
    timeout_s: float = 60.0
    """Seconds to wait until it has done so."""
