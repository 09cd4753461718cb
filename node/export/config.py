"""What a person can set on an exporter. Light: no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.settings import FileOnly  # noqa: TC001 - tyro reads the annotation
from node.membership.config import CallerConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CallerConfig):
    """Write a run's model to a folder, from live replicas of its trunk and its blocks."""

    out: Path = Path("runs/export")
    """Write the model to this folder, which may not be there yet, or be empty."""
    trunk: Path | None = None
    """Take the trunk from this trainer's folder instead of a live trainer."""
    tokenizer: FileOnly[str] = ""
    """Read the run's tokenizer from this file; otherwise from this machine's cache or from a trainer."""
    shard_mb: FileOnly[int] = 1000
    """Write files of at most this many megabytes of weights."""
    wait_for_replicas_s: FileOnly[float] = 60.0
    """Wait up to this many seconds for a part of the model that nobody has now."""
