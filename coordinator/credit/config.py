"""What a person can set on `credit`, and of credit on a coordinator. Light: no hivemind, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from dht.swarm_config import SwarmChoice

COLLECTED: Final = Path("coordinator", "credit")
"""Where in a run's folder a coordinator keeps what it has collected."""


@dataclass(frozen=True, kw_only=True)
class CreditConfig(SwarmChoice):
    """Collect the receipts of a run, and show what its hosts and trainers have earned."""

    out: Path = Path("runs/credit")
    """Keep what was collected in this folder."""
    csv: Path | None = None
    """Write the sums to this file, as a table for spreadsheets."""
    json: Path | None = None
    """Write the sums to this file, for programs."""
    listen: FileOnly[str] = "auto"
    """Listen on this address; auto takes the one that reaches the swarm."""
    timeout_s: FileOnly[float] = 15.0
    """Wait this many seconds for the swarm."""


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """How a coordinator collects receipts."""

    credit_period_s: FileOnly[float] = 300.0
    """Collect the receipts of the run's peers this often, in seconds; 0 never does."""
