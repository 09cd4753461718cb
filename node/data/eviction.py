"""What the cache of corpora holds, for `common.eviction`, which keeps it below its bound.

Before the path of a step. A corpus that a process has mapped stays: that process holds a lock on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from common.eviction import CacheEntry
from node.data.cache import INDEX_FILE, TRAIN_FILE

if TYPE_CHECKING:
    from pathlib import Path

FOLDER_NAME: Final = re.compile(r"(.+-[0-9a-f]{12})(\.building)?")


def stored_corpora(cache_dir: Path) -> list[CacheEntry]:
    """Everything in the cache, what was used longest ago first. Of anything else in the folder nothing."""
    if not cache_dir.is_dir():
        return []
    folders = [path for path in cache_dir.iterdir() if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(filter(None, map(_stored, folders)), key=lambda stored: (stored.used_s, stored.name))


def _stored(folder: Path) -> CacheEntry | None:
    try:
        files = [path.stat() for path in folder.iterdir()]
        index = folder / INDEX_FILE
        used_s = (index if index.exists() else folder).stat().st_mtime
    except FileNotFoundError:  # built anew or deleted just now
        return None
    building = folder.with_name(f"{folder.name.removesuffix('.building')}.lock")
    return CacheEntry(
        name=folder.name,
        paths=(folder,),
        n_bytes=sum(file.st_size for file in files),
        used_s=used_s,
        locks=(building, folder / TRAIN_FILE),
    )
