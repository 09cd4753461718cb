"""What a host tells its owner once it works: where its files are, how it is stopped, and what it may take."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

from common.program import program_name
from node.host.config import HostConfig
from protocol.endpoints import endpoint_text

if TYPE_CHECKING:
    from node.host.events import AnnouncedEvent
    from node.limits.memory import Capacity

logger = logging.getLogger(__name__)


def log_announced(event: AnnouncedEvent, n_experts: int, config: HostConfig, capacity: Capacity) -> None:
    """Log what the host has announced, and then what its owner may want to know."""
    what, where = f"{n_experts} experts in {len(event.versions)} blocks", endpoint_text(event.endpoint)
    seconds = event.seconds_since_start
    logger.info("Hosting %s at %s on %s, announced after %.1f s", what, where, event.device, seconds)
    for words in owner_words(config, capacity):
        logger.info("%s", words)


def owner_words(config: HostConfig, capacity: Capacity) -> tuple[str, str, str]:
    """Three sentences, with commands that can be typed as they are, in whichever folder."""
    state, program = config.state.absolute(), program_name()
    place = "" if config.state == HostConfig().state else f" --state {shlex.quote(str(state))}"
    pause, resume, leave = (f"`{program} {word}{place}`" for word in ("pause", "resume", "leave"))
    threads, blocks = _counted(config.threads, "thread"), _counted(capacity.max_blocks, "block")
    kept = f"Its key, blocks and events are kept in {state}, from which the next start goes on"
    stopped = f"Ctrl+C stops it; from another terminal {pause} and {resume} interrupt its work, "
    taken = f"It computes with {threads} and holds at most {blocks}; `{program} host --help-limits` shows what can be "
    return (
        kept,
        stopped + f"and {leave} hands its blocks over and ends it",
        taken + "limited: memory, processor, bandwidth, disk and hours",
    )


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
