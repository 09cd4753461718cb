"""Files that their owner alone may read, and a secret in one, which is made if it is not there."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING

from common.atomic_file import NO_PERMISSIONS, OTHERS_MAY_ACCESS, keeps_permissions, write_atomically
from common.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES = 32
MAX_KEY_BYTES = 1024
_KEY = re.compile(r"[!-~]{16,512}")


def secret_in(path: Path, name: str) -> str:
    """The secret in `path`, made there with mode 0600 if there is none. `name`: what errors call the file.

    Raises:
        ConfigError: the file is unreadable, open to other users, or holds no key.
    """
    try:
        if not path.exists():
            write_atomically(path, f"{secrets.token_urlsafe(KEY_BYTES)}\n".encode(), mode=0o600)
        return _key(path, name)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error


def read_private(path: Path, max_bytes: int) -> bytes:
    """Up to `max_bytes` of a file that nobody else may read; of the one that was checked, whatever takes its name then.

    Raises OSError, whose `strerror` says what to do where other users can read it.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if status.st_mode & OTHERS_MAY_ACCESS:
            remedy = f"other users can read it; run: chmod 600 {path}"
            raise PermissionError(errno.EPERM, remedy if keeps_permissions(path.parent) else NO_PERMISSIONS)
        return file.read(max_bytes)


def _key(path: Path, name: str) -> str:
    key = read_private(path, MAX_KEY_BYTES).decode("ascii", "replace").strip()
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{name}: must hold one key of 16 to 512 visible ASCII characters; move it away to have a new one made"
        )
    return key
