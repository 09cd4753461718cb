"""Folders that a node uses on this machine, and the locks that keep two processes out of one."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

NODE_LOCK = "node.lock"
"""Held by whoever has the folder's identity.key and writes its events.jsonl: a host, a trainer or a lighthouse."""

SWARM_LOCK = "swarm.lock"
"""Held by whoever writes the folder's swarm.toml: a coordinator or a lighthouse."""

LOCAL_LOCK = "local.lock"
"""Held by a `local`, whose coordinator and first trainer take the other two."""

MAX_HOLDER_BYTES = 200
LOOK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class FolderClaim:
    """A folder, or a file in one, that a process wants for itself: as `role`, because of its flag `flag`.

    `lock`: the lock file's name.
    """

    folder: Path
    role: str
    flag: str
    lock: str = NODE_LOCK
    file: str = ""

    @property
    def path(self) -> Path:
        """The lock file."""
        return self.folder / self.lock

    @property
    def wanted(self) -> Path:
        """What nobody else may use meanwhile."""
        return self.folder / self.file


MAX_SIZE_VARIABLE = "KILOHIVE_CACHE_MAX_SIZE"
DATA_CACHE_BYTES = 10_000_000_000
ASSETS_MAX_SIZE_VARIABLE = "KILOHIVE_ASSETS_MAX_SIZE"
ASSETS_BYTES = 50_000_000_000


def data_cache() -> Path:
    """Where prepared corpora are kept: `$KILOHIVE_CACHE`, else the user's cache folder.

    An account may have no home, or one that it cannot write to: then a folder of its own among temporary files. Raises
    ConfigError where there is none either.
    """
    if named := os.environ.get("KILOHIVE_CACHE"):
        return Path(named)
    usual = _users_cache()
    if usual is not None and _can_be_written(usual):
        return usual
    folder = _own_temporary_folder()
    problem = f"{usual} cannot be written" if usual is not None else "HOME is not set"
    logger.warning("%s, so prepared text is kept in %s; set KILOHIVE_CACHE to keep it elsewhere", problem, folder)
    return folder


def state_folder(role: str) -> Path:
    """Where a node of this account has its key and its files: `$KILOHIVE_STATE/ROLE`, else in the user's data folder.

    It is the same wherever the node is started. For an account without a home it is `state/ROLE` in the folder where
    the node is started.
    """
    if named := os.environ.get("KILOHIVE_STATE"):
        return Path(named) / role
    data = _users_folder("XDG_DATA_HOME", ".local/share")
    return Path("state") / role if data is None else data / role


def give_matplotlib_a_folder() -> None:
    """Where it cannot write to its usual one, Matplotlib would make one for each process, and leave it."""
    usual = _users_cache()
    if usual is None or not _can_be_written(usual):
        folder = os.environ.get("KILOHIVE_CACHE") or _own_temporary_folder()
        os.environ.setdefault("MPLCONFIGDIR", str(Path(folder) / "matplotlib"))


def temporary_folder() -> Path:
    """The folder for temporary files; raises ConfigError if there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise ConfigError(
            "no folder for temporary files can be written; set TMPDIR to one, on a disk that is not full"
        ) from None


def _users_cache() -> Path | None:
    return _users_folder("XDG_CACHE_HOME", ".cache")


def _users_folder(variable: str, below_home: str) -> Path | None:
    """Kilohive's own in the folder that `variable` names, else in the usual one; None for an account without a home."""
    if named := os.environ.get(variable):
        return Path(named) / "kilohive"
    try:
        return Path.home() / below_home / "kilohive"
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return None


def _can_be_written(folder: Path) -> bool:
    """Whether `folder`, or the one in which it would be made, can be written."""
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    return os.access(there, os.W_OK | os.X_OK) and there.is_dir()


def _own_temporary_folder() -> Path:
    """This user's among temporary files, where anybody else may have made one of that name."""
    folder = temporary_folder() / f"kilohive-cache-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else; set KILOHIVE_CACHE to a folder that you can write to")
    return folder


def data_cache_bytes() -> int:
    """How large that cache may grow, 0 for no bound: `$KILOHIVE_CACHE_MAX_SIZE`, else 10 GB. Raises ConfigError."""
    return _bound(MAX_SIZE_VARIABLE, DATA_CACHE_BYTES)


def assets_bytes() -> int:
    """How much of runs' assets is kept, 0 for no bound: `$KILOHIVE_ASSETS_MAX_SIZE`, else 50 GB. Raises ConfigError."""
    return _bound(ASSETS_MAX_SIZE_VARIABLE, ASSETS_BYTES)


def _bound(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "").strip()
    return 0 if text == "0" else parse_size(variable, text) or usual


def prepare_folder(folder: Path) -> None:
    """Make sure that `folder` exists and can be written; raises ConfigError in one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use folder {folder}: {error.strerror}; choose another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to folder {folder}; choose another or change its permissions")


@contextmanager
def claimed(claim: FolderClaim, patience_s: float = 0.0) -> Iterator[None]:
    """Have the folder, which is made if need be, for this process alone while the context lasts.

    The kernel releases the lock however the process ends, and no child inherits it. The file stays; it names the
    holder. Raises ConfigError for a folder that cannot be written, or that another process still has after
    `patience_s`.
    """
    prepare_folder(claim.folder)
    descriptor = _opened(claim)
    try:
        _lock_or_refuse(descriptor, claim, patience_s)
        yield
    finally:
        os.close(descriptor)


def wait_until_free(claim: FolderClaim, patience_s: float) -> None:
    """Raise ConfigError if another process still has the folder after `patience_s`. Writes nothing."""
    if not claim.path.exists():
        return
    descriptor = _opened(claim)
    try:
        with suppress(OSError):  # no locks on this file system, which `claimed` tells
            _wait_for_lock(descriptor, claim, patience_s)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file `path`, made where it is missing: of several processes one at a time goes on."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a crash
        except OSError as error:
            _warn_of_no_lock(path, error)
        yield


def _opened(claim: FolderClaim) -> int:
    """A descriptor of the lock file, which programs that this process starts do not inherit."""
    try:
        return os.open(claim.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot use folder {claim.folder}: {claim.lock}: {error.strerror}; choose another with {claim.flag}"
        ) from None


def _lock_or_refuse(descriptor: int, claim: FolderClaim, patience_s: float) -> None:
    try:
        _wait_for_lock(descriptor, claim, patience_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {claim.role} {os.uname().nodename}\n".encode(), 0)
    except OSError as error:
        # A full disk takes no name, and some file systems have no locks: a node that works is worth more than either.
        _warn_of_no_lock(claim.path, error)


def _warn_of_no_lock(path: Path, error: OSError) -> None:
    logger.warning(
        "%s: cannot be locked: %s; see to it yourself that no second process uses this folder", path, error.strerror
    )


def _wait_for_lock(descriptor: int, claim: FolderClaim, patience_s: float) -> None:
    """Lock the file. Raises ConfigError if somebody has it, OSError where there are no locks."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _refusal(descriptor, claim) from None
            time.sleep(LOOK_S)
        else:
            return


def _refusal(descriptor: int, claim: FolderClaim) -> ConfigError:
    """A sentence that names the holder as far as its file does."""
    words = os.pread(descriptor, MAX_HOLDER_BYTES, 0).decode("utf-8", "replace").split()
    pid, role, machine = (*words, "", "", "")[:3]
    holder = f"{'another' if role == claim.role else 'a'} `{role}`, process {pid}" if role else "another process"
    where = f" on {machine}" if machine and machine != os.uname().nodename else ""
    return ConfigError(f"{claim.wanted} is in use by {holder}{where}: stop that one, or choose another {claim.flag}")
