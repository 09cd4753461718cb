"""One SQLite file, safe from any thread and beside other processes: whole transactions, errors of ours.

It is in WAL mode: what a transaction has written survives the process, and readers do not wait for writers. A crash of
the machine may cost the last transactions, and never more.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5.0
"""How long to wait for another process that writes."""

WAL_BYTES = 16 << 20
"""What the log beside the file is cut back to."""

_SETTINGS = f"""
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA temp_store = FILE;
PRAGMA journal_size_limit = {WAL_BYTES};
"""


class Database:
    """The file at `path` between `open` and `close`; `schema` makes what is missing in it."""

    def __init__(self, path: Path, schema: str) -> None:
        self._path, self._schema = path, schema
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file, made if need be; raises StorageError."""
        with self._lock, self._told():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._connected()

    def open_or_begin_anew(self) -> None:
        """Open the file; one that is damaged is moved to NAME.damaged, with a warning. Raises StorageError."""
        try:
            self.open()
        except StorageError as error:
            if not isinstance(error.__cause__, sqlite3.DatabaseError) or _may_pass(error.__cause__):
                raise
            kept = self._path.with_name(f"{self._path.name}.damaged")
            logger.warning("%s; it is kept as %s, and a new one begun", error, kept)
            self._move_away(kept)
            self.open()

    def close(self) -> None:
        """Close the file; safe to call twice, and before `open`."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Run all of the body's statements or, if it raises, none. One body runs at a time. Raises StorageError."""
        return self._at_once("BEGIN IMMEDIATE")

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """Read all of it as it is at one moment, while other processes go on writing. Raises StorageError."""
        return self._at_once("BEGIN")

    @contextmanager
    def _at_once(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._told():
            connection = self._opened()
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:  # whatever it was, it goes on; what was written does not
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StorageError(f"{self._path}: is not open")
        return self._connection

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.executescript(_SETTINGS)
            connection.executescript(self._schema)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _move_away(self, kept: Path) -> None:
        with self._told():
            self._path.replace(kept)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(f"{self._path.name}{suffix}").unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """An error of the database or the disk as one sentence."""
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror or error}") from error


def _may_pass(error: sqlite3.DatabaseError) -> bool:
    """Whether the file may be sound: it is locked, cannot be opened, or the disk is full."""
    return isinstance(error, sqlite3.OperationalError)
