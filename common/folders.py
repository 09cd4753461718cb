"""Folders that a node uses on this machine."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator


MAX_SIZE_VARIABLE = "KILOHIVE_CACHE_MAX_SIZE"
DATA_CACHE_BYTES = 10_000_000_000


def data_cache() -> Path:
    """Where prepared corpora are kept: `$KILOHIVE_CACHE`, else the user's cache folder."""
    if named := os.environ.get("KILOHIVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilohive"


def data_cache_bytes() -> int:
    """How large that cache may grow, 0 for no bound: `$KILOHIVE_CACHE_MAX_SIZE`, else 10 GB. Raises ConfigError."""
    text = os.environ.get(MAX_SIZE_VARIABLE, "").strip()
    return 0 if text == "0" else parse_size(MAX_SIZE_VARIABLE, text) or DATA_CACHE_BYTES


def prepare_folder(folder: Path) -> None:
    """Make sure that `folder` exists and can be written; raises ConfigError in one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use folder {folder}: {error.strerror}; choose another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to folder {folder}; choose another or change its permissions")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file `path`, made where it is missing: of several processes one at a time goes on."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a crash
        yield
