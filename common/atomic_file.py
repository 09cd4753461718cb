"""Write a file so that a reader, or a crash, sees the old one or the new one and never half of either."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

NOT_KEPT = frozenset({errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""How file systems without permissions refuse a mode, and those that cannot fsync a folder refuse that."""

NO_PERMISSIONS = "its file system keeps no permissions, so that other users can read it; choose a folder on another one"
OTHERS_MAY_ACCESS = 0o077


def write_atomically(path: Path, data: bytes, mode: int = 0o644, keep: Path | None = None) -> None:
    """Temporary file beside `path`, fsync, rename, fsync of the folder. Raises OSError; `path` is then as it was.

    What stood at `path` moves to `keep`, if given, once its successor is safely on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            _set_mode(file.fileno(), mode, path)
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except BaseException:  # whatever it was, it goes on; only the temporary file does not
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk: a rename in it survives a crash from now on. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_KEPT:
            raise
    finally:
        os.close(descriptor)


def keeps_permissions(folder: Path) -> bool:
    """Whether a new file in `folder` is this user's alone if it is meant to be; assumed where none can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return not os.fstat(file.fileno()).st_mode & OTHERS_MAY_ACCESS
    except OSError:
        return True


def _set_mode(descriptor: int, mode: int, path: Path) -> None:
    """A secret is not written where others would read it; all else can do without its mode."""
    try:
        os.fchmod(descriptor, mode)
    except OSError as error:
        if error.errno not in NOT_KEPT:
            raise
    if not mode & OTHERS_MAY_ACCESS and os.fstat(descriptor).st_mode & OTHERS_MAY_ACCESS:
        raise PermissionError(errno.EPERM, NO_PERMISSIONS, str(path))
