"""What a person can set on a server of a model. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import Final

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from node.membership.config import SwarmConfig

MINIMUMS: Final = {
    "port": 0,
    "max_batch": 1,
    "threads": 1,
    "max_queue": 0,
    "cache_mb": 1,
    "max_tokens": 1,
    "max_body_kb": 1,
    "request_timeout_s": 1,
    "wait_for_experts_s": 0,
    "join_timeout_s": 0.1,
}
"""These minimums are for `check_minimums`."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(SwarmConfig):
    """Serve a run's model over HTTP: a trainer's trunk over the swarm's experts, or an export."""

    out: Path | None = None
    """Take the trunk from this trainer's folder instead of a live trainer."""
    export: Path | None = None
    """Serve the model in this folder of `export` instead of a swarm's."""
    listen: str = "127.0.0.1"
    """Serve on this address; any but this machine's own needs --key-file."""
    port: int = 8000
    """Serve on this port; 0 takes a free one."""
    key_file: Path | None = None
    """Ask for the key in this file, which is made if it is not there."""
    max_batch: int = 16
    """Write this many texts at once; others wait."""
    device: str = "auto"
    """Compute on this device: auto, cpu, cuda, cuda:N or mps."""
    threads: int = 1
    """Use this many CPU threads for the trunk."""
    tokenizer: FileOnly[str] = ""
    """Read the run's tokenizer from this file; otherwise from this machine's cache or from a trainer."""
    chat_template: FileOnly[str] = ""
    """Write chats as the template in this Jinja file or tokenizer_config.json says, instead of the model's own."""
    max_queue: FileOnly[int] = 64
    """Let this many texts wait for their turn; more are refused with a retry delay."""
    cache_mb: FileOnly[float] = 1024.0
    """Keep the keys and values of all texts in this much memory, in MB; fewer are written at once if need be."""
    max_tokens: FileOnly[int] = 4096
    """Write at most this many tokens in one text."""
    max_body_kb: FileOnly[float] = 1024.0
    """Refuse requests whose body is larger than this, in kB."""
    request_timeout_s: FileOnly[float] = 600.0
    """End a request that takes longer than this many seconds."""
    wait_for_experts_s: FileOnly[float] = 60.0
    """Wait up to this many seconds in mid-text for hosts that have gone."""
    swarm_listen: FileOnly[str] = "auto"
    """Listen for the swarm on this address; auto takes the one that reaches the swarm."""
