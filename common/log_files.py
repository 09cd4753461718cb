"""The files of a log that is rotated: NAME is written to, NAME.1 is the one before it, NAME.2 is older, and so on."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_READ_BYTES = 1 << 20
LISTINGS = 3
"""How often files are listed to find one: it may get another name while it is looked for."""


def log_files(path: Path) -> list[Path]:
    """Every file of the log that exists, the oldest first."""
    files = {_number(path, file): file for file in path.parent.glob("*") if file.name.startswith(path.name)}
    return [files[number] for number in sorted((number for number in files if number >= 0), reverse=True)]


def rotate(path: Path, n_files: int, before_drop: Callable[[Path], None]) -> None:
    """Make room for a new file at `path`, of `n_files` in all. Each file that goes is shown to `before_drop` first."""
    for file in log_files(path):
        if _number(path, file) >= n_files - 1:
            before_drop(file)
            file.unlink()
    for file in log_files(path):
        file.replace(path.with_name(f"{path.name}.{_number(path, file) + 1}"))


def _number(path: Path, file: Path) -> int:
    """The age of a file of the log: 0 is the newest. Of any other file -1."""
    if file.name == path.name:
        return 0
    suffix = file.name.removeprefix(f"{path.name}.")
    return int(suffix) if suffix.isdecimal() and not suffix.startswith("0") and suffix != file.name else -1


@dataclass(frozen=True, kw_only=True)
class LogPlace:
    """A place in a log, which stays the same when the file that it lies in gets another name."""

    inode: int
    offset: int


def end_of_log(path: Path) -> LogPlace:
    """The place after all that has been written so far."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return LogPlace(inode=0, offset=0)
    return LogPlace(inode=stat.st_ino, offset=stat.st_size)


class LogReader:
    """Reads on in a log from a place, also where it is rotated meanwhile."""

    def __init__(self, path: Path, place: LogPlace) -> None:
        self._path, self._place = path, place

    def new_lines(self) -> list[bytes]:
        """Whole lines that were not read yet, about a megabyte at most; an empty list where there are none."""
        for file in self._unread_files():
            with contextlib.suppress(FileNotFoundError):  # it has got another name just now
                lines = self._read(file)
                if lines:
                    return lines
        return []

    def _unread_files(self) -> list[Path]:
        """The file in which the place lies and those that are newer. If it is gone, all: they were written later."""
        files: list[Path] = []
        for _ in range(LISTINGS):
            files = log_files(self._path)
            for index, file in enumerate(files):
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_ino == self._place.inode:
                        return files[index:]
        return files

    def _read(self, path: Path) -> list[bytes]:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            offset = self._place.offset if stat.st_ino == self._place.inode else 0
            if stat.st_size < offset:  # begun anew in the same file
                offset = 0
            file.seek(offset)
            whole = file.read(MAX_READ_BYTES).rpartition(b"\n")[0]
        if whole:
            self._place = LogPlace(inode=stat.st_ino, offset=offset + len(whole) + 1)
        return whole.splitlines()
