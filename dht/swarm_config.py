"""Which swarm a person meant: an invite, a file, or a run and its peers, which win over either."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.settings import FileOnly, Hidden  # noqa: TC001 - tyro reads the annotation
from protocol.admission import Admission
from protocol.invite import read_join
from protocol.swarm_file import HOW_TO_NAME_A_SWARM, SwarmFile, checked_peers, checked_run_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.invite import Invite


@dataclass(frozen=True, kw_only=True)
class SwarmChoice:
    """The part of a command's configuration that says which swarm: an invite, a file, or the run and its peers."""

    join: str = ""
    """Join the swarm of this invite, invite file or swarm.toml."""
    swarm: Hidden[Path | None] = None
    """File swarm.toml that the coordinator wrote. An older name for what `join` takes, kept for one version."""
    run_id: FileOnly[str] = ""
    """Join this run, as the coordinator printed it, through the initial peers."""
    initial_peers: FileOnly[tuple[str, ...]] = ()
    """Join through the peers at these multiaddresses."""


def resolve(choice: SwarmChoice, clock: Callable[[], float] = time.time) -> tuple[Admission, tuple[str, ...]]:
    """Run, with its token if that is told, and initial peers that a configuration names; raises ConfigError."""
    if choice.join and choice.swarm is not None:
        raise ConfigError("--join and --swarm both name a swarm; give one of them")
    run_id, initial_peers = choice.run_id, choice.initial_peers
    told = told_by(choice, clock)
    if told is not None:
        run_id, initial_peers = run_id or told.run_id, initial_peers or told.initial_peers
    if not run_id or not initial_peers:
        raise ConfigError(HOW_TO_NAME_A_SWARM)
    token = told.admission if told is not None and told.run_id == run_id else b""  # another run has another token
    return Admission(checked_run_id(run_id), token), checked_peers(list(initial_peers))


def told_by(choice: SwarmChoice, clock: Callable[[], float] = time.time) -> Invite | SwarmFile | None:
    """What a configuration's invite or file says; None if it names the run and its peers itself. Raises ConfigError."""
    if choice.join:
        return read_join(choice.join, clock())
    if choice.swarm is not None and not (choice.run_id and choice.initial_peers):
        return SwarmFile.read(choice.swarm)
    return None
