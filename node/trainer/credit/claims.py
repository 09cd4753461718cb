"""The receipts that a trainer has made and hosts have yet to sign: kept on disk, bounded, oldest first.

A claim stands for what one host answered in a minute. It is signed by the host, made again for less, or given up.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from node.credit.answered import PairCounts, count_pairs
from protocol import receipts_pb2 as pb
from protocol.call_signature import MAX_AGE_S
from protocol.identity import peer_id_of, public_key_of
from protocol.receipts import MAX_PAIRS_PER_S, MAX_RECEIPT_AGE_S, NONCE_BYTES, Receipt, open_receipt, sign_receipt

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from node.credit.answered import PairsTaker
    from node.credit.store import ReceiptStore
    from protocol.identity import Identity

CLAIM_S = 60
MAX_CLAIMS_OF_HOST = 60
"""A host that does not sign loses what is older than an hour of its work."""

MAX_CLAIMS = 10_000
MAX_AHEAD_S = MAX_AGE_S / 2
"""How far a claim may end ahead of this node's clock, so that one with another clock still takes it."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    host BLOB NOT NULL,
    start_s INTEGER NOT NULL,
    end_s INTEGER NOT NULL,
    message BLOB NOT NULL,
    lowered INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS claims_by_host ON claims (host, place);
CREATE TABLE IF NOT EXISTS claimed (until_s INTEGER NOT NULL);
"""
_FORGET_BEYOND = """
DELETE FROM claims WHERE start_s < :oldest_s
    OR place <= (SELECT max(place) FROM claims) - :most
    OR place <= (SELECT place FROM claims AS other WHERE other.host = claims.host
                 ORDER BY place DESC LIMIT 1 OFFSET :most_of_host)
"""


class WaitingClaim(NamedTuple):
    """One that waits at `place`; `lowered` if it has been made again for less."""

    place: int
    receipt: Receipt
    message: pb.SignedReceipt
    lowered: bool


class Claims:
    """Keeps trainer `identity`'s claims of one run in its store's file. Safe in any thread; blocks for milliseconds."""

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        store: ReceiptStore,
        taker: PairsTaker,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity, self._run_id, self._store, self._taker, self._clock = identity, run_id, store, taker, clock
        self._making = threading.Lock()
        self._unclaimed: dict[str, PairCounts] = {}

    def make(self) -> None:
        """Claim what was answered since the last time; what cannot be claimed yet waits. Raises StorageError."""
        with self._making:
            for peer_id, pairs in self._taker.take().items():
                count_pairs(self._unclaimed, peer_id, pairs)
            if not self._unclaimed:
                return
            now_s = self._clock()
            with self._store.transaction() as connection:
                claimed_until_s = _claimed_until_s(connection)
                end_s = max(int(now_s), claimed_until_s + 1)
                if end_s > now_s + MAX_AHEAD_S:  # the clock was set back: nobody would take it before it has caught up
                    return
                start_s = max(claimed_until_s, end_s - CLAIM_S)
                left = self._claim_all(connection, start_s, end_s)
                connection.execute("UPDATE claimed SET until_s = ?", (end_s,))
                self._forget(connection, now_s)
            self._unclaimed = left

    def waiting(self) -> dict[str, list[WaitingClaim]]:
        """Claims that hosts have yet to sign, by the host's peer id, each host's oldest first. Raises StorageError."""
        with self._store.transaction() as connection:
            rows = connection.execute("SELECT place, host, message, lowered FROM claims ORDER BY place").fetchall()
        claims: dict[str, list[WaitingClaim]] = {}
        for place, host, raw, lowered in rows:
            message = pb.SignedReceipt.FromString(raw)
            claim = WaitingClaim(place, _receipt_of(message), message, bool(lowered))
            claims.setdefault(peer_id_of(host), []).append(claim)
        return claims

    def settle(self, claim: WaitingClaim, host_signature: bytes) -> None:
        """Keep a claim as a receipt. Raises InvalidInputError if that is not its host's signature, StorageError."""
        both = pb.SignedReceipt()
        both.CopyFrom(claim.message)
        both.host_signature = host_signature
        open_receipt(both)
        with self._store.transaction() as connection:
            self._store.put(connection, both, claim.receipt.end_s)
            connection.execute("DELETE FROM claims WHERE place = ?", (claim.place,))

    def lower(self, claim: WaitingClaim, counted: PairCounts) -> WaitingClaim | None:
        """Claim no more than the host has counted, instead; None, and nothing, if that is none. Raises StorageError."""
        receipt = claim.receipt
        pairs = PairCounts(receipt.forward_pairs, receipt.backward_pairs).at_most(counted)
        if not any(pairs):
            self.give_up(claim)
            return None
        receipt = replace(receipt, forward_pairs=pairs.forward, backward_pairs=pairs.backward, nonce=_nonce())
        message = sign_receipt(self._identity, receipt)
        with self._store.transaction() as connection:
            values = (message.SerializeToString(), claim.place)
            connection.execute("UPDATE claims SET message = ?, lowered = 1 WHERE place = ?", values)
        return WaitingClaim(claim.place, receipt, message, lowered=True)

    def give_up(self, claim: WaitingClaim) -> None:
        """Forget a claim that its host will never sign. Raises StorageError."""
        with self._store.transaction() as connection:
            connection.execute("DELETE FROM claims WHERE place = ?", (claim.place,))

    def _claim_all(self, connection: sqlite3.Connection, start_s: int, end_s: int) -> dict[str, PairCounts]:
        """Write a claim for each host; what is left, since no receipt of so few seconds may hold it."""
        most = MAX_PAIRS_PER_S * (end_s - start_s)
        left: dict[str, PairCounts] = {}
        for peer_id, pairs in self._unclaimed.items():
            claimed = pairs.at_most(PairCounts(most, most))
            if not any(claimed):
                continue
            message = self._signed(peer_id, claimed, start_s, end_s)
            row = (public_key_of(peer_id), start_s, end_s, message.SerializeToString())
            connection.execute(
                "INSERT INTO claims (host, start_s, end_s, message, lowered) VALUES (?, ?, ?, ?, 0)", row
            )
            if claimed != pairs:
                left[peer_id] = PairCounts(pairs.forward - claimed.forward, pairs.backward - claimed.backward)
        return left

    def _signed(self, peer_id: str, pairs: PairCounts, start_s: int, end_s: int) -> pb.SignedReceipt:
        receipt = Receipt(
            run_id=self._run_id,
            host=public_key_of(peer_id),
            trainer=self._identity.public_key,
            start_s=start_s,
            end_s=end_s,
            forward_pairs=pairs.forward,
            backward_pairs=pairs.backward,
            nonce=_nonce(),
        )
        return sign_receipt(self._identity, receipt)

    def _forget(self, connection: sqlite3.Connection, now_s: float) -> None:
        self._store.forget_old(connection, now_s)
        oldest_s = int(now_s) - MAX_RECEIPT_AGE_S
        bounds = {"oldest_s": oldest_s, "most": MAX_CLAIMS, "most_of_host": MAX_CLAIMS_OF_HOST}
        connection.execute(_FORGET_BEYOND, bounds)


def _claimed_until_s(connection: sqlite3.Connection) -> int:
    """Where the last claims ended; each run of the trainer goes on from there."""
    row = connection.execute("SELECT until_s FROM claimed").fetchone()
    if row is None:
        connection.execute("INSERT INTO claimed VALUES (0)")
        return 0
    until_s: int = row[0]
    return until_s


def _receipt_of(message: pb.SignedReceipt) -> Receipt:
    """The receipt in a message of our own, whose signature need not be checked again."""
    said = pb.Receipt.FromString(message.receipt)
    return Receipt(**{name.name: getattr(said, name.name) for name in said.DESCRIPTOR.fields})


def _nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)
