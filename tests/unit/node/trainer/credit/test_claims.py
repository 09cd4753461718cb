"""What a trainer claims for hosts: minute by minute, bounded, and still there after a restart."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from common.errors import InvalidInputError, StorageError
from node.credit.answered import AnsweredPairs, PairCounts
from node.credit.store import ReceiptStore
from node.trainer.credit import claims as claims_module
from node.trainer.credit.claims import SCHEMA, Claims
from protocol import receipts_pb2 as pb
from protocol.receipts import MAX_PAIRS_PER_S, MAX_RECEIPT_AGE_S, countersign, open_claim, open_receipt
from tests.support.crediting import HOST, NOW_S, RUN, STRANGER, TRAINER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.trainer.credit.claims import WaitingClaim
    from protocol.identity import Identity


class Trainer:
    """A trainer's counts and claims, at a time that a test moves."""

    def __init__(self, folder: Path, now_s: float = NOW_S) -> None:
        self.now_s = now_s
        self.answered = AnsweredPairs()
        self.store = ReceiptStore(folder, RUN, SCHEMA)
        self.claims = Claims(TRAINER, RUN, self.store, self.answered.taker(), lambda: self.now_s)
        self.store.open()

    def count(self, forward: int, backward: int, host: Identity = HOST) -> None:
        self.answered.add(host.peer_id, PairCounts(forward, backward))

    def minute(self, forward: int = 20, backward: int = 10) -> None:
        self.count(forward, backward)
        self.now_s += 60
        self.claims.make()

    def of(self, host: Identity = HOST) -> list[WaitingClaim]:
        return self.claims.waiting().get(host.peer_id, [])

    def receipts(self) -> list[pb.SignedReceipt]:
        return list(self.store.page(pb.CollectRequest()).receipts)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(tmp_path)
    with closing(made.store):
        yield made


def pairs_of(claims: list[WaitingClaim]) -> list[tuple[int, int]]:
    return [(claim.receipt.forward_pairs, claim.receipt.backward_pairs) for claim in claims]


def test_a_claim_for_each_host_stands_for_the_last_minute(trainer: Trainer) -> None:
    trainer.count(5, 3)
    trainer.count(7, 0, STRANGER)
    trainer.count(1, 1)
    trainer.claims.make()
    trainer.claims.make()
    (of_host,), (of_other,) = trainer.of(), trainer.of(STRANGER)
    assert open_claim(of_host.message) == of_host.receipt
    assert (of_host.receipt.host, of_host.receipt.trainer) == (HOST.public_key, TRAINER.public_key)
    assert (of_host.receipt.start_s, of_host.receipt.end_s) == (NOW_S - 60, NOW_S)
    assert pairs_of([of_host, of_other]) == [(6, 4), (7, 0)]
    assert of_host.receipt.nonce != of_other.receipt.nonce


def test_minutes_follow_each_other_and_never_overlap(trainer: Trainer) -> None:
    trainer.minute()
    trainer.now_s += 3600
    for _ in range(3):  # at once, as when a trainer ends right after a round
        trainer.count(1, 1)
        trainer.claims.make()
    intervals = [(claim.receipt.start_s, claim.receipt.end_s) for claim in trainer.of()]
    end_s = NOW_S + 60 + 3600
    assert intervals == [
        (NOW_S, NOW_S + 60),
        (end_s - 60, end_s),
        (end_s, end_s + 1),
        (end_s + 1, end_s + 2),
    ]


def test_nothing_is_claimed_ahead_of_time_when_the_clock_was_set_back(trainer: Trainer) -> None:
    trainer.minute()
    trainer.now_s -= 600
    trainer.minute()
    assert len(trainer.of()) == 1
    trainer.now_s += 600
    trainer.claims.make()
    assert pairs_of(trainer.of()) == [(20, 10), (20, 10)]


def test_a_signed_claim_is_kept_as_a_receipt(trainer: Trainer) -> None:
    trainer.minute()
    (claim,) = trainer.of()
    trainer.claims.settle(claim, countersign(HOST, claim.message))
    assert trainer.of() == []
    (receipt,) = trainer.receipts()
    assert open_receipt(receipt) == claim.receipt


def test_what_is_not_the_hosts_signature_settles_nothing(trainer: Trainer) -> None:
    trainer.minute()
    (claim,) = trainer.of()
    for signature in (b"", bytes(64), countersign(STRANGER, claim.message)):
        with pytest.raises(InvalidInputError, match="host_signature"):
            trainer.claims.settle(claim, signature)
    assert trainer.of() == [claim]
    assert trainer.receipts() == []


def test_a_claim_is_lowered_to_what_the_host_has_counted(trainer: Trainer) -> None:
    trainer.minute(20, 10)
    (claim,) = trainer.of()
    lowered = trainer.claims.lower(claim, PairCounts(15, 99))
    assert lowered is not None
    assert trainer.of() == [lowered]
    assert lowered.lowered
    assert pairs_of([lowered]) == [(15, 10)]
    assert open_claim(lowered.message) == lowered.receipt
    assert lowered.receipt.nonce != claim.receipt.nonce
    assert trainer.claims.lower(lowered, PairCounts(0, 0)) is None
    assert trainer.of() == []


def test_claims_outlive_the_trainer_and_the_next_minutes_come_after_them(trainer: Trainer, tmp_path: Path) -> None:
    trainer.minute()
    before = trainer.of()
    again = Trainer(tmp_path, trainer.now_s + 0.5)
    with closing(again.store):
        again.count(1, 1)
        again.claims.make()
        first, second = again.of()
        assert [first] == before
        assert second.receipt.start_s == first.receipt.end_s


def test_what_cannot_be_written_is_claimed_later(trainer: Trainer) -> None:
    trainer.store.close()
    trainer.count(2, 1)
    with pytest.raises(StorageError, match="is not open"):
        trainer.claims.make()
    trainer.store.open()
    trainer.minute(20, 10)
    assert pairs_of(trainer.of()) == [(22, 11)]


def test_a_host_that_never_signs_keeps_no_more_than_an_hour_waiting(trainer: Trainer) -> None:
    trainer.count(7, 7, STRANGER)
    for _ in range(65):
        trainer.minute()
    assert len(trainer.of()) == 60
    assert trainer.of()[-1].receipt.end_s == trainer.now_s
    assert len(trainer.of(STRANGER)) == 1


def test_no_number_of_hosts_fills_the_disk(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "MAX_CLAIMS", 5)
    for _ in range(9):
        trainer.minute()
    assert len(trainer.of()) == 5


def test_what_no_host_would_sign_any_more_is_forgotten(trainer: Trainer) -> None:
    trainer.minute()
    trainer.now_s += MAX_RECEIPT_AGE_S + 60
    trainer.minute(1, 1)
    assert pairs_of(trainer.of()) == [(1, 1)]


def test_more_than_a_receipt_may_hold_is_claimed_with_the_next_ones(trainer: Trainer) -> None:
    most = 60 * MAX_PAIRS_PER_S
    trainer.minute(most + 5, 10)
    trainer.minute(0, 1)
    assert pairs_of(trainer.of()) == [(most, 10), (5, 1)]
