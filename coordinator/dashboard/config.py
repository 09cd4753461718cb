"""What a person can set on the server of a run's page. Light: no hivemind, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from dht.swarm_config import SwarmChoice

MINIMUMS: Final = {
    "port": 0,
    "refresh_s": 0.5,
    "credit_s": 1.0,
    "max_clients": 1,
    "history_mb": 1,
    "join_timeout_s": 0.1,
}
"""These minimums are for `check_minimums`."""


@dataclass(frozen=True, kw_only=True)
class DashboardConfig(SwarmChoice):
    """Show a run in the browser, live and over time, from its DHT alone."""

    listen: str = "127.0.0.1"
    """Serve on this address; any but this machine's own needs --key-file."""
    port: int = 8080
    """Serve on this port; 0 takes a free one."""
    key_file: Path | None = None
    """Ask for the key in this file, which is made if it is not there."""
    out: Path = Path("runs/dashboard")
    """Keep the run's history in this folder."""
    credit: Path | None = None
    """Show the credit that `credit` or a coordinator has collected in this folder."""
    refresh_s: FileOnly[float] = 2.0
    """Look at the DHT this often, in seconds."""
    credit_s: FileOnly[float] = 60.0
    """Add up what is in --credit this often, in seconds."""
    max_clients: FileOnly[int] = 64
    """Keep this many open pages up to date; more are refused with a retry delay."""
    history_mb: FileOnly[float] = 32.0
    """Let the history take at most this many megabytes."""
    package: FileOnly[str] = "kilohive"
    """Tell those who join to install this: a name on PyPI, or the address of a wheel."""
    image: FileOnly[str] = "kilohive"
    """Tell those who join to run this container image."""
    swarm_listen: FileOnly[str] = "auto"
    """Listen for the swarm on this address; auto takes the one that reaches the swarm."""
    join_timeout_s: FileOnly[float] = 60.0
    """Wait this many seconds for the swarm at the start."""
