"""What a cache on the disk holds, and how it is kept below its bound: what was used longest ago goes first.

What a process uses stays: that process holds a lock on it.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Something in a cache, or what a crash left of something that was to be: files and folders that go together.

    `used_s` is when it was last used, in seconds since 1970. Whoever uses it holds a lock on one of the files `locks`,
    which are made where they are missing.
    """

    name: str
    paths: tuple[Path, ...]
    n_bytes: int
    used_s: float
    locks: tuple[Path, ...]

    def in_use(self) -> bool:
        """Whether a process makes or reads it now."""
        with self._alone() as alone:
            return not alone

    def remove(self) -> bool:
        """Delete it unless it is in use; whether it is gone. Raises OSError."""
        try:
            with self._alone() as alone:
                if alone:
                    for path in self.paths:
                        _delete(path)
                return alone
        except FileNotFoundError:  # another process was faster
            return True

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep others from it, if nobody uses it."""
        with ExitStack() as stack:
            files = [stack.enter_context(lock.open("ab")) for lock in self.locks]
            try:
                for file in files:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def keep_below(max_bytes: int, folder: Path, stored_in: Callable[[Path], Sequence[CacheEntry]]) -> None:
    """Delete from `folder` until it holds at most `max_bytes`, or only what is in use; 0 sets no bound.

    `stored_in` lists it, what was used longest ago first. What cannot be deleted stays, and is told.
    """
    if not max_bytes:
        return
    try:
        stored = stored_in(folder)
        left = sum(one.n_bytes for one in stored) - max_bytes
        for one in stored:
            if left > 0 and one.remove():
                left -= one.n_bytes
                logger.info("Deleted %s from %s, to keep that below %s bytes", one.name, folder, f"{max_bytes:,}")
    except OSError as error:
        logger.warning("%s cannot be kept below its bound: %s", folder, error.strerror or error)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
