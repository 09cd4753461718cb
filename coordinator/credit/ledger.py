"""What was collected of a run's receipts, in an SQLite file: which there are, which count, and what each pair comes to.

The same receipt counts once, whoever sends it and however often. Of two receipts of one pair whose times overlap one
counts: going by (start, nonce, digest), each that begins no earlier than the last one that counts has ended. That
depends on the receipts and not on the order in which they come; sums are corrected where an earlier one comes late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from common.database import Database
from common.errors import ConfigError
from protocol.identity import public_key_of
from protocol.receipts import MAX_RECEIPT_AGE_S

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from coordinator.credit.members import RunMember
    from protocol.profile import Profile
    from protocol.receipts import Receipt

LEDGER_FILE = "credit.sqlite"
MAX_LEDGER_BYTES = 4 << 30
KEPT_S = MAX_RECEIPT_AGE_S + 86_400
"""Receipts are kept for a day longer than any other could be taken that overlaps them; sums stay."""

_PAGE_BYTES = 4096  # SQLite's own
_SCHEMA = f"""
PRAGMA max_page_count = {MAX_LEDGER_BYTES // _PAGE_BYTES};
CREATE TABLE IF NOT EXISTS run (id TEXT NOT NULL, forgotten_s INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS peers (
    n INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    is_host INTEGER NOT NULL DEFAULT 0,
    is_trainer INTEGER NOT NULL DEFAULT 0,
    own_tokens INTEGER NOT NULL DEFAULT 0,
    name TEXT NOT NULL DEFAULT '',
    team TEXT NOT NULL DEFAULT '',
    store BLOB NOT NULL DEFAULT x'',
    place INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS receipts (
    host INTEGER NOT NULL,
    trainer INTEGER NOT NULL,
    start_s INTEGER NOT NULL,
    nonce BLOB NOT NULL,
    digest BLOB NOT NULL,
    end_s INTEGER NOT NULL,
    forward INTEGER NOT NULL,
    backward INTEGER NOT NULL,
    counts INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (host, trainer, start_s, nonce, digest)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS receipts_that_count ON receipts (host, trainer, start_s) WHERE counts = 1;
CREATE TABLE IF NOT EXISTS pairs (
    host INTEGER NOT NULL,
    trainer INTEGER NOT NULL,
    forward INTEGER NOT NULL,
    backward INTEGER NOT NULL,
    receipts INTEGER NOT NULL,
    PRIMARY KEY (host, trainer)
) WITHOUT ROWID;
"""
_SEE = """
UPDATE peers SET is_host = max(is_host, ?), is_trainer = max(is_trainer, ?), own_tokens = max(own_tokens, ?) WHERE n = ?
"""
_NEXT = """
SELECT start_s, nonce, digest, end_s, forward, backward, counts FROM receipts
    WHERE host = ? AND trainer = ? AND start_s >= ? ORDER BY start_s, nonce, digest LIMIT 1
"""
_COUNTING = """
SELECT start_s, nonce, digest, end_s, forward, backward, counts FROM receipts
    WHERE host = ? AND trainer = ? AND start_s >= ? AND counts = 1 ORDER BY start_s
"""
_LAST_COUNTING = """
SELECT end_s FROM receipts
    WHERE host = ? AND trainer = ? AND start_s < ? AND counts = 1 ORDER BY start_s DESC LIMIT 1
"""
_SET_COUNTS = """
UPDATE receipts SET counts = ? WHERE host = ? AND trainer = ? AND start_s = ? AND nonce = ? AND digest = ?
"""
_ADD_TO_PAIR = """
INSERT INTO pairs VALUES (?, ?, ?, ?, ?) ON CONFLICT (host, trainer) DO UPDATE SET
    forward = forward + excluded.forward,
    backward = backward + excluded.backward,
    receipts = receipts + excluded.receipts
"""


class Checked(NamedTuple):
    """A receipt whose signatures hold, and the digest by which it is known."""

    receipt: Receipt
    digest: bytes


class _Row(NamedTuple):
    """A receipt as the file has it."""

    start_s: int
    nonce: bytes
    digest: bytes
    end_s: int
    forward: int
    backward: int
    counts: int


class Ledger:
    """Keeps the ledger of run `run_id` in `folder`. Safe in any thread and beside other processes; blocks."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder, self._run_id = folder, run_id
        self._database = Database(folder / LEDGER_FILE, _SCHEMA)

    def open(self) -> None:
        """Open the file, or begin anew if it is damaged. Raises StorageError, ConfigError if it is another run's."""
        self._database.open_or_begin_anew()
        with self._database.transaction() as connection:
            row = connection.execute("SELECT id FROM run").fetchone()
            if row is None:
                connection.execute("INSERT INTO run (id) VALUES (?)", (self._run_id,))
            elif row[0] != self._run_id:
                self._refuse(str(row[0]))

    def close(self) -> None:
        """Close the file; safe to call twice, and before `open`."""
        self._database.close()

    def see(self, members: Iterable[RunMember]) -> None:
        """These peers are in the run; what a trainer has said before that it has trained on stays. StorageError."""
        with self._database.transaction() as connection:
            for member in members:
                number = _number(connection, public_key_of(member.address.peer_id))
                said = (member.role == "host", member.role == "trainer", member.own_tokens, number)
                connection.execute(_SEE, said)

    def name(self, peer_id: str, profile: Profile | None) -> None:
        """A peer wants to be called so from now on; None: it is anonymous. Raises StorageError."""
        name, team = (profile.name, profile.team) if profile is not None else ("", "")
        with self._database.transaction() as connection:
            number = _number(connection, public_key_of(peer_id))
            connection.execute("UPDATE peers SET name = ?, team = ? WHERE n = ?", (name, team, number))

    def place(self, peer_id: str) -> tuple[bytes, int]:
        """Which of a peer's stores was read up to which place; nothing, and 0, at first. Raises StorageError."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT store, place FROM peers WHERE key = ?", (public_key_of(peer_id),)
            ).fetchone()
        return (b"", 0) if row is None else (row[0], row[1])

    def take(self, receipts: Sequence[Checked], source: str, store: bytes, place: int) -> int:
        """Take a page of a peer's store in, which ends at `place`; how many receipts of it are new.

        Raises StorageError: nothing is taken, the place stays.
        """
        with self._database.transaction() as connection:
            (forgotten_s,) = connection.execute("SELECT forgotten_s FROM run").fetchone()
            n_new = _add(connection, [one for one in receipts if one.receipt.start_s >= forgotten_s])
            connection.execute(
                "UPDATE peers SET store = ?, place = ? WHERE n = ?",
                (store, place, _number(connection, public_key_of(source))),
            )
        return n_new

    def forget_old(self, now_s: float) -> None:
        """Delete receipts so old that none could come any more that overlaps them. Sums stay. Raises StorageError.

        From then on none of that age is taken, also if the clock is set back: it may have counted already.
        """
        oldest_s = int(now_s) - KEPT_S
        with self._database.transaction() as connection:
            connection.execute("UPDATE run SET forgotten_s = max(forgotten_s, ?)", (oldest_s,))
            pairs = connection.execute("SELECT host, trainer FROM pairs").fetchall()
            connection.executemany(
                f"DELETE FROM receipts WHERE host = ? AND trainer = ? AND start_s < {oldest_s}",  # noqa: S608 - a number of ours
                pairs,
            )

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """Read all of it as it is at one moment; nobody who writes waits. Raises StorageError."""
        return self._database.reading()

    def _refuse(self, other: str) -> NoReturn:
        raise ConfigError(f"{self._folder} holds what was collected of run {other}; name another folder")


def _number(connection: sqlite3.Connection, key: bytes) -> int:
    """The number under which the file has a peer, given at its first mention."""
    connection.execute("INSERT OR IGNORE INTO peers (key) VALUES (?)", (key,))
    n: int = connection.execute("SELECT n FROM peers WHERE key = ?", (key,)).fetchone()[0]
    return n


def _add(connection: sqlite3.Connection, receipts: Iterable[Checked]) -> int:
    """Write receipts down, and count anew what they change; how many there were not before."""
    numbers: dict[bytes, int] = {}
    touched: dict[tuple[int, int], tuple[int, int]] = {}
    n_new = 0
    for receipt, digest in receipts:
        for key in (receipt.host, receipt.trainer):
            if key not in numbers:
                numbers[key] = _number(connection, key)
        pair = (numbers[receipt.host], numbers[receipt.trainer])
        times = (receipt.start_s, receipt.nonce, digest, receipt.end_s)
        row = (*pair, *times, receipt.forward_pairs, receipt.backward_pairs)
        added = connection.execute("INSERT OR IGNORE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", row).rowcount
        if added:
            first_s, last_s = touched.get(pair, (receipt.start_s, receipt.start_s))
            touched[pair] = (min(first_s, receipt.start_s), max(last_s, receipt.start_s))
            n_new += 1
    for pair, (first_s, last_s) in touched.items():
        _recount(connection, pair, first_s, last_s)
    return n_new


def _recount(connection: sqlite3.Connection, pair: tuple[int, int], first_s: int, last_s: int) -> None:
    """Find out which of a pair's receipts count, from `first_s` on, after new ones that begin up to `last_s`."""
    last = connection.execute(_LAST_COUNTING, (*pair, first_s)).fetchone()
    chain, unchanged_from_s = _chain(connection, pair, max(first_s, last[0] if last else 0), last_s)
    counted = set()
    for row in map(_Row._make, connection.execute(_COUNTING, (*pair, first_s))):
        if unchanged_from_s is not None and row.start_s >= unchanged_from_s:
            break
        counted.add(row)
    _set_counts(connection, pair, counted - {row._replace(counts=1) for row in chain}, 0)
    _set_counts(connection, pair, {row for row in chain if not row.counts}, 1)


def _chain(
    connection: sqlite3.Connection, pair: tuple[int, int], from_s: int, last_s: int
) -> tuple[list[_Row], int | None]:
    """The receipts that count from `from_s` on, up to where all goes on as before; and where that is."""
    chain: list[_Row] = []
    while (found := connection.execute(_NEXT, (*pair, from_s)).fetchone()) is not None:
        row = _Row._make(found)
        if row.counts and row.start_s > last_s:
            return chain, row.start_s
        chain.append(row)
        from_s = row.end_s
    return chain, None


def _set_counts(connection: sqlite3.Connection, pair: tuple[int, int], rows: Iterable[_Row], counts: int) -> None:
    """Let rows count or not, and a pair's sums with them."""
    rows, sign = list(rows), 1 if counts else -1
    connection.executemany(_SET_COUNTS, [(counts, *pair, row.start_s, row.nonce, row.digest) for row in rows])
    forward, backward = sum(row.forward for row in rows), sum(row.backward for row in rows)
    connection.execute(_ADD_TO_PAIR, (*pair, sign * forward, sign * backward, sign * len(rows)))
