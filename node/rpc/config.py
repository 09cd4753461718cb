"""What a person can set on `health`. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Ask the node of a folder on this machine whether it serves."""

    state: Path = Path("state/host")
    """The node's folder: a host's --state, a trainer's or a coordinator's --out."""
    timeout_s: float = 3.0
    """Seconds to wait for its answer."""
    insecure_local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The node was started with --insecure-local."""
