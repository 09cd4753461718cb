"""What a host has been credited with, read from its store while the host goes on writing there.

Receipts are read once: only those that are new since the last look are added.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from common.errors import StorageError
from node.credit.store import FOLDER
from protocol import receipts_pb2 as pb
from protocol.receipts import MAX_RECEIPT_AGE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE_RECEIPTS: Final = 2000
TIMEOUT_S: Final = 2.0
_NEW = "SELECT place, message FROM receipts WHERE place > ? ORDER BY place LIMIT ?"
_ACCOUNTS = """
SELECT coalesce(sum(counted_forward + counted_backward), 0), coalesce(sum(left_forward + left_backward), 0), count(*)
FROM trainers
"""


@dataclass(frozen=True, kw_only=True)
class CreditFigures:
    """Pairs, forward and backward together: `answered` in all, `waiting` for a receipt, and those of receipts.

    `first_s`: when the earliest receipt that is kept began, in seconds since 1970; None without any.
    """

    answered: int
    waiting: int
    trainers: int
    confirmed: int
    confirmed_today: int
    receipts: int
    first_s: int | None


class CreditReader:
    """Reads the store of one host's run. Blocks for milliseconds, and longer at first: call it off the event loop."""

    def __init__(self, folder: Path, run_id: str, day_of: Callable[[float], str] | None = None) -> None:
        self._path = folder / FOLDER / f"{run_id}.sqlite"
        self._day_of = day_of or _local_day
        self._begin_anew(b"")

    def read(self, now_s: float) -> CreditFigures | None:
        """What is known now; None where nothing is kept yet. Raises StorageError."""
        if not self._path.exists():
            return None
        try:
            with closing(
                sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)
            ) as store:
                row = store.execute("SELECT id FROM store").fetchone()
                if row is not None and row[0] != self._id:
                    self._begin_anew(row[0])
                while rows := store.execute(_NEW, (self._place, PAGE_RECEIPTS)).fetchall():
                    self._add(rows)
                answered, waiting, trainers = store.execute(_ACCOUNTS).fetchone()
        except (sqlite3.Error, DecodeError) as error:
            raise StorageError(f"{self._path}: {error}") from error
        self._forget_old(now_s)
        return CreditFigures(
            answered=answered,
            waiting=waiting,
            trainers=trainers,
            confirmed=sum(self._pairs.values()),
            confirmed_today=self._pairs[self._day_of(now_s)],
            receipts=sum(self._receipts.values()),
            first_s=self._first_s,
        )

    def _begin_anew(self, store_id: bytes) -> None:
        self._id, self._place = store_id, 0
        self._pairs, self._receipts = Counter[str](), Counter[str]()
        self._first_s: int | None = None

    def _add(self, rows: list[tuple[int, bytes]]) -> None:
        for place, message in rows:
            receipt = pb.Receipt.FromString(pb.SignedReceipt.FromString(message).receipt)
            day = self._day_of(receipt.start_s)
            self._pairs[day] += receipt.forward_pairs + receipt.backward_pairs
            self._receipts[day] += 1
            self._first_s = min(self._first_s or receipt.start_s, receipt.start_s)
            self._place = place

    def _forget_old(self, now_s: float) -> None:
        """Days of which the host keeps nothing any more: what is shown is that of the last thirty days."""
        oldest = self._day_of(now_s - MAX_RECEIPT_AGE_S)
        for day in [day for day in self._pairs if day < oldest]:
            del self._pairs[day], self._receipts[day]


def _local_day(seconds: float) -> str:
    """The day by this machine's clock; days compare as texts."""
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
