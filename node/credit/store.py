"""The receipts of one node, as both sides have signed them, in an SQLite file: kept for thirty days, read page by page.

Host and trainer keep tables of their own beside it, so that what they count and what they sign changes together.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from common.database import Database
from protocol import receipts_pb2 as pb
from protocol.receipts import MAX_PAGE_RECEIPTS, MAX_RECEIPT_AGE_S, STORE_BYTES, receipt_digest

if TYPE_CHECKING:
    import sqlite3
    from contextlib import AbstractContextManager
    from pathlib import Path

MAX_RECEIPTS = 200_000
"""About 80 MB; the oldest go first."""

FOLDER = "credit"

SCHEMA = """
CREATE TABLE IF NOT EXISTS store (id BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS receipts (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL UNIQUE,
    end_s INTEGER NOT NULL,
    message BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS receipts_by_end ON receipts (end_s);
"""


class ReceiptStore:
    """Keeps receipts of one run below a node's folder. Blocks for milliseconds: call it off the event loop."""

    def __init__(self, folder: Path, run_id: str, more_schema: str = "", max_receipts: int = MAX_RECEIPTS) -> None:
        self._database = Database(folder / FOLDER / f"{run_id}.sqlite", SCHEMA + more_schema)
        self._max_receipts = max_receipts
        self.id = b""

    def open(self) -> None:
        """Open it, and begin anew if the file is damaged. Raises StorageError."""
        self._database.open_or_begin_anew()
        with self.transaction() as connection:
            row = connection.execute("SELECT id FROM store").fetchone()
            self.id = row[0] if row else secrets.token_bytes(STORE_BYTES)
            if row is None:
                connection.execute("INSERT INTO store VALUES (?)", (self.id,))

    def close(self) -> None:
        """Close it; safe to call twice, and before `open`."""
        self._database.close()

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Several changes as one; raises StorageError."""
        return self._database.transaction()

    def put(self, connection: sqlite3.Connection, message: pb.SignedReceipt, end_s: int) -> None:
        """Keep what both have signed, within a transaction. The same receipt is kept once."""
        row = (receipt_digest(message), end_s, message.SerializeToString())
        connection.execute("INSERT OR IGNORE INTO receipts (digest, end_s, message) VALUES (?, ?, ?)", row)

    def find(self, connection: sqlite3.Connection, message: pb.SignedReceipt) -> pb.SignedReceipt | None:
        """The receipt with both signatures, within a transaction; None if it is not kept here."""
        row = connection.execute("SELECT message FROM receipts WHERE digest = ?", (receipt_digest(message),)).fetchone()
        return None if row is None else pb.SignedReceipt.FromString(row[0])

    def forget_old(self, connection: sqlite3.Connection, now_s: float) -> None:
        """Delete, within a transaction, what nobody would credit any more, and the oldest of too many."""
        connection.execute("DELETE FROM receipts WHERE end_s < ?", (int(now_s) - MAX_RECEIPT_AGE_S,))
        newest = "(SELECT coalesce(max(place), 0) FROM receipts)"
        connection.execute(f"DELETE FROM receipts WHERE place <= {newest} - ?", (self._max_receipts,))  # noqa: S608 - a text of ours

    def page(self, request: pb.CollectRequest) -> pb.ReceiptPage:
        """The receipts behind the place that `request` names, if it counts in this store; else from the first."""
        after = min(request.after, (1 << 63) - 1) if request.store == self.id else 0
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT place, message FROM receipts WHERE place > ? ORDER BY place LIMIT ?",
                (after, MAX_PAGE_RECEIPTS + 1),
            ).fetchall()
        page = pb.ReceiptPage(store=self.id, next=after, more=len(rows) > MAX_PAGE_RECEIPTS)
        for place, message in rows[:MAX_PAGE_RECEIPTS]:
            page.receipts.append(pb.SignedReceipt.FromString(message))
            page.next = place
        return page
