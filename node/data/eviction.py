"""What the cache of corpora holds, and how it is kept below its bound: what was used longest ago goes first.

Before the path of a step. A corpus that a process has mapped stays: that process holds a lock on it.
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from node.data.cache import INDEX_FILE, TRAIN_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER_NAME: Final = re.compile(r"(.+-[0-9a-f]{12})(\.building)?")


@dataclass(frozen=True, kw_only=True)
class StoredCorpus:
    """A corpus in the cache, or what a crash left of one that was being built."""

    folder: Path
    n_bytes: int
    used_s: float

    def in_use(self) -> bool:
        """Whether a process builds or reads it now."""
        with self._alone() as alone:
            return not alone

    def remove(self) -> bool:
        """Delete it unless it is in use; whether it is gone. Raises OSError."""
        try:
            with self._alone() as alone:
                if alone:
                    shutil.rmtree(self.folder)
                return alone
        except FileNotFoundError:  # another process was faster
            return True

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep others from it, if nobody uses it."""
        lock = self.folder.with_name(f"{self.folder.name.removesuffix('.building')}.lock")
        with lock.open("ab") as building, (self.folder / TRAIN_FILE).open("ab") as reading:
            try:
                for file in (building, reading):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def stored_corpora(cache_dir: Path) -> list[StoredCorpus]:
    """Everything in the cache, what was used longest ago first. Of anything else in the folder nothing."""
    if not cache_dir.is_dir():
        return []
    folders = [path for path in cache_dir.iterdir() if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(filter(None, map(_stored, folders)), key=lambda stored: (stored.used_s, stored.folder))


def trim(cache_dir: Path, max_bytes: int) -> None:
    """Delete corpora until at most `max_bytes` are left, or only those in use; says which. Raises OSError."""
    stored = stored_corpora(cache_dir)
    left = sum(corpus.n_bytes for corpus in stored) - max_bytes
    for corpus in stored:
        if left > 0 and corpus.remove():
            left -= corpus.n_bytes
            logger.info("Deleted %s from the data cache, to keep it below %s bytes", corpus.folder, f"{max_bytes:,}")


def _stored(folder: Path) -> StoredCorpus | None:
    try:
        files = [path.stat() for path in folder.iterdir()]
        index = folder / INDEX_FILE
        used_s = (index if index.exists() else folder).stat().st_mtime
    except FileNotFoundError:  # built anew or deleted just now
        return None
    return StoredCorpus(folder=folder, n_bytes=sum(file.st_size for file in files), used_s=used_s)
