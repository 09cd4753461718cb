"""What a person can set on a host, and on the commands that steer one. Light: no torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import Final

import tyro  # noqa: TC002 - it reads the annotation itself

from common.config import EVENT_LOG_MINIMUMS, EventLogConfig
from common.settings import FileOnly, Hidden  # noqa: TC001 - tyro reads the annotation
from node.credit.config import ProfileConfig
from node.limits.config import LimitsConfig
from node.membership.config import ReachConfig, SwarmConfig
from node.rpc.config import host_folder

MINIMUMS: Final = {
    "max_blocks": 1,
    "recheck_s": 0,
    "anew_after_s": 0,
    "threads": 1,
    "port": 0,
    "metrics_port": 0,
    "relay_circuits": 0,
    "relay_circuits_per_caller": 1,
    "relay_reservations": 1,
    "max_queue_tokens": 1,
    "keep_inputs_mb": 0,
    "keep_inputs_s": 0,
    "checkpoint_every_s": 0.1,
    "join_timeout_s": 0.1,
    **EVENT_LOG_MINIMUMS,
}
"""These minimums are for `check_minimums`."""


@dataclass(frozen=True, kw_only=True)
class HostConfig(LimitsConfig, EventLogConfig, ProfileConfig, ReachConfig, SwarmConfig):
    """Host blocks of experts for a run."""

    state: Path = field(default_factory=host_folder)
    """Keep key, checkpoints and event log in this folder."""
    blocks: str = "auto"
    """Host these blocks, such as 0/0-3,1/7; auto takes those most needed. Each is layer/block."""
    max_blocks: int = 8
    """Take at most this many blocks with --blocks auto."""
    anew_after_s: FileOnly[float] = 60.0
    """In a run that has trained, begin a block that nobody has anew only after this many seconds; 0 never waits."""
    recheck_s: FileOnly[float] = 10.0
    """Look this often, in seconds, at which blocks to take, to move or to try again; 0 never does."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the experts' arithmetic."""
    port: int = 0
    """Use this port for the gRPC server; 0 takes a free one."""
    relay_circuits: int = 16
    """Carry this many calls at once for peers behind a NAT. It does so if others can dial it, and not with 0."""
    relay_circuits_per_caller: FileOnly[int] = 16
    """Of these, carry this many for one caller."""
    relay_reservations: FileOnly[int] = 32
    """Make this many peers behind a NAT reachable through this node."""
    metrics_port: int = 0
    """Serve Prometheus metrics at this port; 0 serves none."""
    page_listen: str = "127.0.0.1:8090"
    """Show the page for this machine's owner at this address and port; none shows none."""
    max_queue_tokens: FileOnly[int] = 65_536
    """Let this many tokens wait for this host; more are refused with a retry delay."""
    keep_inputs_mb: FileOnly[int] = 256
    """Keep the inputs between a forward and its backward in this much memory, in MB."""
    keep_inputs_s: FileOnly[float] = 120.0
    """Keep a forward's inputs for this many seconds."""
    checkpoint_every_s: FileOnly[float] = 60.0
    """Save the blocks this often, in seconds."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Tell the host of a folder on this machine what its owner wants."""

    state: Path = field(default_factory=host_folder)
    """Speak to the host of this folder."""
    timeout_s: FileOnly[float] = 60.0
    """Wait this many seconds until it has done so."""


@dataclass(frozen=True, kw_only=True)
class PauseConfig(ControlConfig):
    """Have the host of a folder on this machine stop working, for a while or until it is told to resume."""

    duration: tyro.conf.Positional[str] = ""
    """Pause for this long, such as 30m, 2h or 1h30m. Without one the pause lasts until `resume`."""


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Show what the host of a folder on this machine does, in a browser, to its owner alone."""

    state: Hidden[Path] = field(default_factory=host_folder)
    """Show the host of this folder."""
    listen: FileOnly[str] = "127.0.0.1:8090"
    """Show it at this address and port; if the port is taken, at the next that is free."""
    listen_fd: Hidden[int] = -1
    """Listen on this open socket instead, as a host has it that starts its page. The page ends when nobody looks."""
