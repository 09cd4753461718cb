"""How a node joins a run. Light: no torch and no hivemind here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dht.swarm_config import SwarmChoice


@dataclass(frozen=True, kw_only=True)
class SwarmConfig(SwarmChoice):
    """Which swarm to join, and how this node takes part in its DHT."""

    listen: str = "auto"
    """Address to listen on; auto: it reaches the swarm."""
    announce: str = ""
    """Address that others call, if it is another: a router's."""
    dht_port: int = 0
    """Port of the DHT node; 0 takes a free one."""
    join_timeout_s: float = 60.0
    """Seconds to wait for the swarm at the start."""
    insecure_local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Neither encrypt nor sign calls; on this machine only."""
    stop_on_stdin_eof: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave when standard input ends. For a parent process that starts this one."""
