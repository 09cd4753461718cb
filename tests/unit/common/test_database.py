"""A file of SQLite: whole transactions, from any thread, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from common.database import Database
from common.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = "CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "new" / "things.sqlite", SCHEMA)) as made:
        made.open()
        yield made


def count(database: Database) -> int:
    with database.transaction() as connection:
        n: int = connection.execute("SELECT coalesce(sum(n), 0) FROM things").fetchone()[0]
    return n


def add(database: Database, name: str) -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO things VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1", (name,))


def add_both(database: Database, *names: str) -> None:
    """In one transaction; an empty name is refused after what came before it was written."""
    with database.transaction() as connection:
        for name in names:
            if not name:
                raise InvalidInputError("name", "is empty")
            connection.execute("INSERT INTO things VALUES (?, 1)", (name,))


def test_what_was_written_is_there_when_the_file_is_opened_again(database: Database, tmp_path: Path) -> None:
    add(database, "one")
    database.close()
    database.close()
    with closing(Database(tmp_path / "new" / "things.sqlite", SCHEMA)) as again:
        again.open()
        assert count(again) == 1


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(InvalidInputError):
        add_both(database, "half", "")
    assert count(database) == 0


def test_threads_take_turns(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: add(database, "one"), range(40)))
    assert count(database) == 40


def test_two_that_have_the_file_open_see_what_each_other_write(database: Database, tmp_path: Path) -> None:
    with closing(Database(tmp_path / "new" / "things.sqlite", SCHEMA)) as other:
        other.open()
        for name in ("one", "two"):
            add(other, name)
            add(database, name)
        assert count(other) == count(database) == 4


def test_a_mistake_of_the_database_is_one_sentence_that_names_the_file(database: Database) -> None:
    with pytest.raises(StorageError, match=r"things\.sqlite: .*UNIQUE"):
        add_both(database, "one", "one")
    assert count(database) == 0


def test_a_database_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not open"):
        add(Database(tmp_path / "things.sqlite", SCHEMA), "one")


def test_a_damaged_file_is_told_or_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "things.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with closing(Database(path, SCHEMA)) as database:
        with pytest.raises(StorageError, match=r"things\.sqlite: file is not a database"):
            database.open()
        database.open_or_begin_anew()
        add(database, "one")
    assert path.with_name("things.sqlite.damaged").read_bytes().startswith(b"no database")
    assert "is kept as" in caplog.text


def test_a_file_that_is_only_in_use_is_not_set_aside(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "new" / "things.sqlite"
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        locked = Database(path, "CREATE TABLE more (n)")
        with pytest.MonkeyPatch.context() as patch, closing(locked):
            patch.setattr("common.database.BUSY_TIMEOUT_S", 0.01)
            with pytest.raises(StorageError, match="locked"):
                locked.open_or_begin_anew()
        other.execute("ROLLBACK")
    assert not path.with_name("things.sqlite.damaged").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"things\.sqlite: Not a directory|File exists"):
        Database(tmp_path / "file" / "things.sqlite", SCHEMA).open()
