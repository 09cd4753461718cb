"""A Unix socket beside a process's other files, which only its own user can reach, however long its path is."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_PATH_BYTES = 103
"""The longest path of a Unix socket: 108 with the final zero on Linux, 104 on macOS."""

MODE = 0o600


def listening_unix_socket(path: Path) -> socket.socket:
    """A socket at `path`, in place of what a process that was killed left there. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), MODE)  # Linux makes the file with it, so that it is never open to others
        with _short(path) as name:
            listener.bind(name)
        path.chmod(MODE)  # for systems that do not
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def connected_unix_socket(path: Path) -> socket.socket:
    """A socket that is connected to the one at `path`. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(0)
    try:
        with _short(path) as name:
            await asyncio.get_running_loop().sock_connect(connection, name)
    except BaseException:  # cancelled, too: nobody has it yet
        connection.close()
        raise
    return connection


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Another name for a file whose path is too long: through its folder, which Linux opens by a short one."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
