"""What a host has answered for each trainer, and how much of it is not signed for yet: kept over a restart.

A host signs no more than it has counted. What a trainer claims less is carried over to its next claim, within bounds.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from common.errors import InvalidInputError, LimitExceededError
from node.credit.answered import PairCounts, count_pairs
from protocol import receipts_pb2 as pb
from protocol.identity import public_key_of
from protocol.receipts import MAX_RECEIPT_AGE_S, check_receipt, countersign, open_claim

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from node.credit.answered import PairsTaker
    from node.credit.store import ReceiptStore
    from protocol.identity import Identity
    from protocol.receipts import Receipt

MAX_TRAINERS = 4096
"""Those for whom a host has answered most; with a key each, strangers push out nobody who trains."""

MAX_CARRIED_PAIRS = 1 << 40
SCHEMA = """
CREATE TABLE IF NOT EXISTS trainers (
    key BLOB PRIMARY KEY,
    counted_forward INTEGER NOT NULL,
    counted_backward INTEGER NOT NULL,
    left_forward INTEGER NOT NULL,
    left_backward INTEGER NOT NULL,
    signed_until_s INTEGER NOT NULL,
    heard_s INTEGER NOT NULL
) WITHOUT ROWID;
"""
_COUNT = """
INSERT INTO trainers VALUES (:key, :forward, :backward, :forward, :backward, 0, :now_s) ON CONFLICT (key) DO UPDATE SET
    counted_forward = counted_forward + excluded.counted_forward,
    counted_backward = counted_backward + excluded.counted_backward,
    left_forward = min(:most, left_forward + excluded.left_forward),
    left_backward = min(:most, left_backward + excluded.left_backward),
    heard_s = excluded.heard_s
"""
_FORGET_BEYOND = """
DELETE FROM trainers WHERE key IN
    (SELECT key FROM trainers ORDER BY counted_forward + counted_backward DESC LIMIT -1 OFFSET ?)
"""


class _Account(NamedTuple):
    """What may still be signed for one trainer, and where its last receipt ended, in seconds since 1970."""

    left: PairCounts
    signed_until_s: int


class TrainerAccounts:
    """Keeps host `identity`'s accounts of one run in its store's file. Safe in any thread; blocks for milliseconds."""

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        store: ReceiptStore,
        taker: PairsTaker,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity, self._run_id, self._store, self._taker, self._clock = identity, run_id, store, taker, clock
        self._saving = threading.Lock()
        self._unsaved: dict[str, PairCounts] = {}

    def save(self) -> None:
        """Write what was counted since the last time; what cannot be written waits. Raises StorageError."""
        with self._saving:
            for peer_id, pairs in self._taker.take().items():
                count_pairs(self._unsaved, peer_id, pairs)
            if not self._unsaved:
                return
            now_s = int(self._clock())
            rows = [_count_row(peer_id, pairs, now_s) for peer_id, pairs in self._unsaved.items()]
            with self._store.transaction() as connection:
                connection.executemany(_COUNT, rows)
                connection.execute(_FORGET_BEYOND, (MAX_TRAINERS,))
            self._unsaved.clear()

    def forget_old(self) -> None:
        """Delete receipts and trainers of which nothing can be credited any more. Raises StorageError."""
        now_s = self._clock()
        with self._store.transaction() as connection:
            self._store.forget_old(connection, now_s)
            connection.execute("DELETE FROM trainers WHERE heard_s < ?", (int(now_s) - MAX_RECEIPT_AGE_S,))

    def countersign(self, claim: pb.SignedReceipt, caller: str) -> pb.CountersignResponse:
        """Sign what `caller`, a trainer's peer id, claims; the same claim again gets the same signature.

        Raises:
            InvalidInputError: the claim is not well formed, not about the two, or of an interval that is signed for.
            LimitExceededError: it claims more than this host has counted and not signed for.
            StorageError: it cannot be written down; nothing is signed.
        """
        receipt = open_claim(claim)
        self._check_parties(receipt, caller)
        check_receipt(receipt, self._run_id, self._clock())
        self.save()
        with self._store.transaction() as connection:
            known = self._store.find(connection, claim)
            if known is not None:
                return pb.CountersignResponse(host_signature=known.host_signature)
            self._charge(connection, receipt)
            signature = countersign(self._identity, claim)
            both = pb.SignedReceipt(
                receipt=claim.receipt, trainer_signature=claim.trainer_signature, host_signature=signature
            )
            self._store.put(connection, both, receipt.end_s)
        return pb.CountersignResponse(host_signature=signature)

    def counted(self, caller: str) -> pb.CountedResponse:
        """What may still be signed for `caller`, a trainer's peer id. Raises StorageError."""
        self.save()
        with self._store.transaction() as connection:
            left = _account(connection, public_key_of(caller)).left
        return pb.CountedResponse(forward_pairs=left.forward, backward_pairs=left.backward)

    def total(self) -> PairCounts:
        """Return all pairs that this host has counted for the trainers that it remembers. Raises StorageError."""
        self.save()
        with self._store.transaction() as connection:
            sums = "coalesce(sum(counted_forward), 0), coalesce(sum(counted_backward), 0)"
            return PairCounts(*connection.execute(f"SELECT {sums} FROM trainers").fetchone())  # noqa: S608 - a text of ours

    def _check_parties(self, receipt: Receipt, caller: str) -> None:
        if receipt.host != self._identity.public_key:
            raise InvalidInputError("receipt.host", f"is {receipt.host_id}, not this host")
        if receipt.trainer_id != caller:
            raise InvalidInputError("receipt.trainer", f"is {receipt.trainer_id}, not the caller")

    def _charge(self, connection: sqlite3.Connection, receipt: Receipt) -> None:
        """Take a receipt's pairs off what may still be signed for its trainer."""
        account = _account(connection, receipt.trainer)
        if receipt.start_s < account.signed_until_s:
            problem = f"is {receipt.start_s}, but this host has signed up to {account.signed_until_s} already"
            raise InvalidInputError("receipt.start_s", problem)
        claimed = PairCounts(receipt.forward_pairs, receipt.backward_pairs)
        for name, pairs, left in zip(("forward_pairs", "backward_pairs"), claimed, account.left, strict=True):
            if pairs > left:
                why = "what this host has counted for the caller and not signed for"
                raise LimitExceededError(f"receipt.{name}", pairs, left, why)
        connection.execute(
            "UPDATE trainers SET left_forward = left_forward - ?, left_backward = left_backward - ?, "
            "signed_until_s = ? WHERE key = ?",
            (*claimed, receipt.end_s, receipt.trainer),
        )


def _account(connection: sqlite3.Connection, key: bytes) -> _Account:
    row = connection.execute(
        "SELECT left_forward, left_backward, signed_until_s FROM trainers WHERE key = ?", (key,)
    ).fetchone()
    return _Account(PairCounts(), 0) if row is None else _Account(PairCounts(row[0], row[1]), row[2])


def _count_row(peer_id: str, pairs: PairCounts, now_s: int) -> dict[str, object]:
    """Return the values that `_COUNT` names."""
    key = public_key_of(peer_id)
    return {"key": key, **pairs._asdict(), "now_s": now_s, "most": MAX_CARRIED_PAIRS}
