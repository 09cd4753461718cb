"""The public face: what a model of one's own imports to use a swarm's experts, and to load a model that has left one.

    from kilohive import SwarmClient, SwarmConfig, load_model

Everything in `__all__` keeps its name and meaning within a minor version; all else is free to move. The command is
`run_node.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent

try:
    from common.errors import (
        ConfigError,
        DeadlineError,
        KilohiveError,
        TooFewExpertsError,
        UnavailableError,
    )
    from node.membership.config import ReachConfig, SwarmConfig
    from node.model.gate import Gate
    from node.model.moe import LocalExperts, LocalMoE, MoE
    from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher
    from node.trainer.exported.loading import load_model
    from node.trainer.remote_moe import RemoteMoE
    from node.trainer.swarm_client import SwarmClient
    from protocol.identity import Identity
    from protocol.manifest import Manifest
    from protocol.version import VERSION
except ImportError as error:
    _name = (error.name or "").partition(".")[0]
    _file = getattr(sys.modules.get(_name), "__file__", None)
    if _name not in {"common", "dht", "node", "protocol"} or _file is None or Path(_file).parents[1] == _HERE:
        raise
    raise ImportError(
        f"kilohive has a package `{_name}`, and Python finds another module of that name first, {_file}: rename that "
        "one, or take its folder off Python's path",
        name=_name,
    ) from error

__all__ = [
    "VERSION",
    "ConfigError",
    "DeadlineError",
    "DispatchConfig",
    "Dispatcher",
    "Gate",
    "Identity",
    "KilohiveError",
    "LocalExperts",
    "LocalMoE",
    "Manifest",
    "MoE",
    "ReachConfig",
    "RemoteMoE",
    "SwarmClient",
    "SwarmConfig",
    "TooFewExpertsError",
    "UnavailableError",
    "load_model",
]
