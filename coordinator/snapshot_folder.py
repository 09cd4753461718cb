"""The folder of a run's snapshots: which are whole, and which one goes.

    2026-11-30T12-00-00Z/            what `export` wrote; named by when it was begun, so that names sort by time
    2026-11-30T18-00-00Z.partial/    what an export has written that is not done; .2026-11-30T18-00-00Z.lock is its lock
    .2026-11-29T18-00-00Z.deleted/   one that is being deleted
    run.txt                          whose they are

An export gives its folder the name last, and a snapshot loses its name before anything in it is deleted: what has one
is whole. An export that ended early is not gone on with, since its parts would be of moments that lie far apart.
"""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from common.atomic_file import write_atomically
from common.errors import ConfigError
from common.folders import FolderClaim, prepare_folder, wait_until_free

if TYPE_CHECKING:
    from pathlib import Path

NAME_FORMAT: Final = "%Y-%m-%dT%H-%M-%SZ"
LEFTOVER: Final = re.compile(r"\.?(?P<name>.+)\.(?:partial|deleted|lock)")
RUN_FILE: Final = "run.txt"
LAST_FILE: Final = "SHA256SUMS"
"""What `export` writes last."""

MAX_RUN_FILE_BYTES = 1024
LEAVE_PATIENCE_S = 1.0
"""How long the export of a coordinator that was killed may take to end."""


def snapshot_name(began_s: float) -> str:
    """The name of a snapshot that was begun at `began_s`, seconds since 1970: UTC, to the second."""
    return datetime.fromtimestamp(began_s, UTC).strftime(NAME_FORMAT)


def began_at(name: str) -> float | None:
    """When a snapshot of this name was begun, in seconds since 1970; None for another name."""
    try:
        began_s = datetime.strptime(name, NAME_FORMAT).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
    return began_s if snapshot_name(began_s) == name else None


class SnapshotFolder:
    """A run's snapshots in a folder of their own. Belongs to one coordinator at a time."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder, self._run_id = folder, run_id

    def open(self) -> None:
        """Make the folder, or find that it is the run's; raises ConfigError if it is another's or cannot be used."""
        prepare_folder(self.folder)
        path = self.folder / RUN_FILE
        try:
            if not path.exists():
                write_atomically(path, f"{self._run_id}\n".encode())
            with path.open("rb") as file:
                held = file.read(MAX_RUN_FILE_BYTES).decode(errors="replace").strip()
        except OSError as error:
            raise ConfigError(f"snapshots: {path}: {error.strerror or error}; name another folder") from None
        if held != self._run_id:
            raise ConfigError(f"snapshots: {self.folder} is for those of run {held[:60]}; name another folder")

    def whole(self) -> list[str]:
        """Names of the snapshots that are whole, the oldest first. Raises OSError."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(name for name in names if began_at(name) is not None and self.is_whole(name))

    def is_whole(self, name: str) -> bool:
        """Whether all of this snapshot is there."""
        return (self.folder / name / LAST_FILE).is_file()

    def n_bytes(self, name: str) -> int:
        """What this snapshot takes of the disk. Raises OSError."""
        return sum(path.stat().st_size for path in (self.folder / name).iterdir())

    def drop_older(self, newest: str, keep: int) -> tuple[str, ...]:
        """Delete the oldest snapshots until `keep` are left with `newest`, which is whole. Returns their names.

        `newest` stays, also where a clock that was wrong has left names that sort behind it. Raises OSError.
        """
        others = [name for name in self.whole() if name != newest]
        names = tuple(others[: max(0, len(others) + 1 - keep)])
        for name in names:
            deleted = self._deleted(name)
            (self.folder / name).rename(deleted)
            shutil.rmtree(deleted)
        return names

    def tidy(self) -> None:
        """Delete what exports have left that did not come to their end, and what was being deleted.

        Raises ConfigError if one of them still goes on, OSError if something cannot be deleted.
        """
        found = (LEFTOVER.fullmatch(path.name) for path in self.folder.iterdir())
        for name in sorted({match["name"] for match in found if match and began_at(match["name"]) is not None}):
            lock = f".{name}.lock"
            claim = FolderClaim(folder=self.folder, file=name, lock=lock, role="coordinator", flag="snapshots")
            wait_until_free(claim, LEAVE_PATIENCE_S)
            for folder in (self.folder / f"{name}.partial", self._deleted(name)):
                if folder.exists():
                    shutil.rmtree(folder)
            claim.path.unlink(missing_ok=True)

    def _deleted(self, name: str) -> Path:
        return self.folder / f".{name}.deleted"
