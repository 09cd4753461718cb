"""The private folder of p2pd's sockets and, while it starts, its key: short whatever TMPDIR is, and gone with its node.

A node holds a lock on its folder for as long as it lives. One that was killed leaves the folder behind; the next node
that starts or stops on this machine removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

import psutil

from common.errors import ConfigError
from common.folders import temporary_folder

FOLDER_PREFIX = "kilohive-p2pd-"
CONTROL_SOCKET, CLIENT_SOCKET, KEY_FILE = "p2pd.sock", "client.sock", "identity.key"
STALE_FOLDER_S = 60.0
"""A folder whose node cannot be told is looked at once it is this old."""

MAX_SOCKET_PATH_BYTES = 103
"""The longest path of a unix socket: 108 with the final zero on Linux, 104 on macOS."""

MAX_PARENT_BYTES = MAX_SOCKET_PATH_BYTES - len(f"/{FOLDER_PREFIX}1234567-12345678/{CLIENT_SOCKET}")
"""The longest path of a folder in which there is room for those of the sockets: process id and random characters."""

SHORT_FOLDER = Path("/tmp")  # noqa: S108 - only for a folder of mode 0700 with a random name
"""Where the folder goes when the path of the folder for temporary files (TMPDIR) is too long for a socket."""


class SocketFolder:
    """A folder that was made for this process; raises ConfigError where there is no place for one."""

    def __init__(self) -> None:
        self.path = _made_folder()
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _try_to_lock(self._lock)

    @property
    def control_socket(self) -> str:
        """Multiaddress at which p2pd takes orders."""
        return f"/unix{self.path / CONTROL_SOCKET}"

    @property
    def client_socket(self) -> str:
        """Multiaddress at which the node takes the streams that peers open."""
        return f"/unix{self.path / CLIENT_SOCKET}"

    @property
    def key_file(self) -> Path:
        """Where p2pd reads its key when it starts."""
        return self.path / KEY_FILE

    def remove(self) -> None:
        """Remove it with all that it holds, and what dead nodes have left. Safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        shutil.rmtree(self.path, ignore_errors=True)
        remove_stale_folders()


def remove_stale_folders() -> None:
    """A killed node leaves its folder, with sockets that nobody listens at; remove those of all dead nodes."""
    for parent in parents():
        for folder in parent.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(OSError):  # somebody else's, in use, or gone by now
                if _node_is_dead(folder) or time.time() - folder.stat().st_mtime > STALE_FOLDER_S:
                    _remove_if_dead(folder)


def parents() -> list[Path]:
    """Where a folder can be, the best first: those with a path that is short enough for the sockets in it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [temporary_folder(), SHORT_FOLDER, *([Path(runtime)] if runtime else [])]
    return [place for place in dict.fromkeys(places) if len(os.fsencode(place)) <= MAX_PARENT_BYTES]


def _made_folder() -> Path:
    """Make a folder in the first place that can be written and takes sockets, which not every file system does."""
    problem = ""
    for parent in parents():
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=parent))  # mode 0700
        except OSError as error:
            problem = problem or f"{parent}: {error.strerror}"
            continue
        try:
            _try_socket(folder / CLIENT_SOCKET)
        except OSError as error:
            problem = problem or f"{parent}: takes no sockets: {error.strerror}"
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return folder
    raise ConfigError(
        f"no folder for the sockets of p2pd ({problem or 'no path is short enough'}); set TMPDIR to a folder that you "
        f"can write to, with a path of at most {MAX_PARENT_BYTES} bytes"
    )


def _try_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.bind(str(path))
    path.unlink()


def _node_is_dead(folder: Path) -> bool:
    """Whether its name tells a node's process, which is gone and holds no lock on it. Raises OSError."""
    pid, _, rest = folder.name.removeprefix(FOLDER_PREFIX).partition("-")
    if not rest or not pid.isascii() or not pid.isdecimal() or psutil.pid_exists(int(pid)):
        return False
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _try_to_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or this file system has no locks: then a folder's age tells
        return False
    return True


def _remove_if_dead(folder: Path) -> None:
    """Raises OSError for a folder that holds anything but dead sockets and the key of a p2pd that did not start."""
    # p2pd's own first, and the node's only if that is dead: a node takes every connection there for a call of p2pd's.
    files = sorted(folder.iterdir(), key=lambda path: path.name != CONTROL_SOCKET)
    if all(path.name == KEY_FILE or _is_dead_socket(path) for path in files):
        for path in files:
            path.unlink()
        folder.rmdir()


def _is_dead_socket(path: Path) -> bool:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - the name of socket's method
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # its queue is full, for one: somebody is there
            return False
    return False
