"""Which swarm a person meant: an invite, a file, or flags that win over either."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from protocol.errors import ConfigError
from protocol.invite import read_invite
from protocol.swarm_file import HOW_TO_NAME_A_SWARM, SwarmFile, checked_peers, checked_run_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class SwarmChoice(Protocol):
    """The part of a node's configuration that says which swarm to join."""

    @property
    def join(self) -> str:
        """Invite, or the name of a file with one."""

    @property
    def swarm(self) -> Path | None:
        """File written by a coordinator."""

    @property
    def run_id(self) -> str:
        """Run to join; wins over the invite's and the file's."""

    @property
    def initial_peers(self) -> tuple[str, ...]:
        """Multiaddresses; they win over the invite's and the file's."""


def resolve(choice: SwarmChoice, clock: Callable[[], float] = time.time) -> tuple[str, tuple[str, ...]]:
    """Run id and initial peers of the swarm that a configuration names; raises ConfigError."""
    if choice.join and choice.swarm is not None:
        raise ConfigError("--join and --swarm both name a swarm; give one of them")
    run_id, initial_peers = choice.run_id, choice.initial_peers
    if choice.join:
        invite = read_invite(choice.join, clock())
        run_id, initial_peers = run_id or invite.run_id, initial_peers or invite.initial_peers
    elif choice.swarm is not None and not (run_id and initial_peers):
        file = SwarmFile.read(choice.swarm)
        run_id, initial_peers = run_id or file.run_id, initial_peers or file.initial_peers
    if not run_id or not initial_peers:
        raise ConfigError(HOW_TO_NAME_A_SWARM)
    return checked_run_id(run_id), checked_peers(list(initial_peers))
