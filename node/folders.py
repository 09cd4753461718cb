"""Folders that a node uses on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from protocol.errors import ConfigError


def data_cache() -> Path:
    """Where prepared corpora are kept: `$KILOHIVE_CACHE`, else the user's cache folder."""
    if named := os.environ.get("KILOHIVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilohive"


def prepare_folder(folder: Path) -> None:
    """Make sure that `folder` exists and can be written; raises ConfigError in one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use folder {folder}: {error.strerror}; choose another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to folder {folder}; choose another or change its permissions")
