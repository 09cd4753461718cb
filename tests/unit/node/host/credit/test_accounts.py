"""What a host signs for a trainer: no more than it counted, no minute twice, and nothing for anybody else."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import InvalidInputError, LimitExceededError, StorageError
from node.credit.answered import AnsweredPairs, PairCounts
from node.credit.store import ReceiptStore
from node.host.credit import accounts as accounts_module
from node.host.credit.accounts import SCHEMA, TrainerAccounts
from protocol import receipts_pb2 as pb
from protocol.identity import Identity
from protocol.receipts import MAX_RECEIPT_AGE_S, open_receipt, sign_receipt
from tests.support.crediting import HOST, NOW_S, RECEIPT, RUN, STRANGER, TRAINER, minutes, receipt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from protocol.receipts import Receipt


class Host:
    """A host's counts and accounts, at a time that a test moves."""

    def __init__(self, folder: Path) -> None:
        self.now_s = float(NOW_S)
        self.answered = AnsweredPairs()
        self.store = ReceiptStore(folder, RUN, SCHEMA)
        self.accounts = TrainerAccounts(HOST, RUN, self.store, self.answered.taker(), lambda: self.now_s)
        self.store.open()

    def answer(self, forward: int, backward: int, trainer: Identity = TRAINER) -> None:
        self.answered.add(trainer.peer_id, PairCounts(forward, backward))

    def sign(self, what: Receipt, trainer: Identity = TRAINER) -> pb.SignedReceipt:
        """The receipt with both signatures; raises what the host does."""
        claim = sign_receipt(trainer, what)
        claim.host_signature = self.accounts.countersign(claim, trainer.peer_id).host_signature
        assert open_receipt(claim) == what
        return claim

    def left(self, trainer: Identity = TRAINER) -> tuple[int, int]:
        said = self.accounts.counted(trainer.peer_id)
        return said.forward_pairs, said.backward_pairs

    def kept(self) -> list[pb.SignedReceipt]:
        return list(self.store.page(pb.CollectRequest()).receipts)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    with closing(made.store):
        yield made


def test_what_was_counted_is_signed_and_kept(host: Host) -> None:
    host.answer(1500, 1000)
    host.answer(500, 0)
    both = host.sign(RECEIPT)
    assert host.kept() == [both]
    assert host.left() == (0, 0)


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ((1999, 1000), "receipt.forward_pairs: is 2000, but the limit is 1999: what this host has counted"),
        ((2000, 999), "receipt.backward_pairs: is 1000, but the limit is 999: what this host has counted"),
    ],
)
def test_a_claim_above_what_was_counted_is_refused_and_takes_nothing(
    host: Host, counted: tuple[int, int], words: str
) -> None:
    host.answer(*counted)
    with pytest.raises(LimitExceededError, match=words):
        host.sign(RECEIPT)
    assert host.kept() == []
    assert host.left() == counted
    host.answer(1, 1)
    host.sign(RECEIPT)


def test_a_claim_below_is_signed_and_the_difference_carried_over_within_bounds(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.answer(2500, 1000)
    host.sign(RECEIPT)
    assert host.left() == (500, 0)
    monkeypatch.setattr(accounts_module, "MAX_CARRIED_PAIRS", 600)
    host.answer(500, 7)
    assert host.left() == (600, 7)
    assert host.accounts.total() == (3000, 1007)


def test_the_same_claim_again_gets_the_same_signature_and_takes_nothing(host: Host) -> None:
    host.answer(5000, 5000)
    assert host.sign(RECEIPT) == host.sign(RECEIPT)
    assert host.left() == (3000, 4000)
    assert len(host.kept()) == 1


def test_no_second_is_signed_for_twice(host: Host) -> None:
    host.answer(9000, 9000)
    host.sign(RECEIPT)
    for start_s in (RECEIPT.start_s, RECEIPT.end_s - 1, RECEIPT.start_s - 60):
        with pytest.raises(InvalidInputError, match=r"receipt\.start_s: is \d+, but this host has signed up to"):
            host.sign(receipt(start_s=start_s, end_s=start_s + 60, nonce=bytes([1] * 16)))
    host.sign(receipt(start_s=RECEIPT.end_s, end_s=RECEIPT.end_s + 60))


def test_one_trainer_claims_nothing_of_another(host: Host) -> None:
    host.answer(9000, 9000, STRANGER)
    with pytest.raises(LimitExceededError, match="but the limit is 0"):
        host.sign(RECEIPT)
    with pytest.raises(InvalidInputError, match=r"receipt\.trainer: is .*, not the caller"):
        host.accounts.countersign(sign_receipt(TRAINER, RECEIPT), STRANGER.peer_id)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_id": "demo-0123456789ac"}, r"receipt\.run_id"),
        ({"host": STRANGER.public_key}, r"receipt\.host: is .*, not this host"),
        ({"start_s": NOW_S + 60, "end_s": NOW_S + 70}, r"receipt\.end_s: is 70 s ahead"),
        ({"start_s": NOW_S - MAX_RECEIPT_AGE_S - 1, "end_s": NOW_S - MAX_RECEIPT_AGE_S}, r"receipt\.start_s"),
    ],
    ids=["run", "host", "future", "past"],
)
def test_a_claim_about_something_else_is_refused(host: Host, changes: dict[str, Any], words: str) -> None:
    host.answer(9000, 9000)
    with pytest.raises(InvalidInputError, match=words):
        host.sign(receipt(**changes))
    assert host.left() == (9000, 9000)


def test_a_claim_that_its_trainer_has_not_signed_is_refused(host: Host) -> None:
    host.answer(9000, 9000)
    claim = sign_receipt(TRAINER, RECEIPT)
    claim.trainer_signature = STRANGER.sign(b"receipt/1", claim.receipt)
    with pytest.raises(InvalidInputError, match="trainer_signature"):
        host.accounts.countersign(claim, TRAINER.peer_id)


def test_counts_and_signatures_outlive_the_host(host: Host, tmp_path: Path) -> None:
    host.answer(2500, 1500)
    first = host.sign(RECEIPT)
    host.answer(1, 1)
    host.accounts.save()
    again = Host(tmp_path)
    with closing(again.store):
        assert again.left() == (501, 501)
        assert again.sign(RECEIPT) == first
        with pytest.raises(InvalidInputError, match="signed up to"):
            again.sign(receipt(forward_pairs=1, backward_pairs=1))
        assert again.accounts.total() == (2501, 1501)


def test_what_cannot_be_written_waits_and_nothing_is_signed_meanwhile(host: Host) -> None:
    host.store.close()
    host.answer(2000, 1000)
    with pytest.raises(StorageError, match="is not open"):
        host.sign(RECEIPT)
    host.answer(1, 0)
    host.store.open()
    host.sign(RECEIPT)
    assert host.left() == (1, 0)


def test_strangers_with_a_key_each_push_out_nobody_who_trains(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "MAX_TRAINERS", 3)
    host.answer(2000, 1000)
    for _ in range(5):
        host.answer(1, 0, Identity.generate())
        host.accounts.save()
    with host.store.transaction() as connection:
        assert connection.execute("SELECT count(*) FROM trainers").fetchone() == (3,)
    host.sign(RECEIPT)


def test_who_has_not_called_for_thirty_days_is_forgotten_with_his_receipts(host: Host) -> None:
    host.answer(2000, 1000)
    host.sign(RECEIPT)
    host.now_s += MAX_RECEIPT_AGE_S + 1
    host.answer(7, 7, STRANGER)
    host.accounts.save()
    host.accounts.forget_old()
    assert host.kept() == []
    assert host.accounts.total() == (7, 7)


def test_minute_after_minute_adds_up_to_what_was_counted(host: Host) -> None:
    for one in minutes(10, forward_pairs=20, backward_pairs=10):
        host.answer(20, 10)
        host.sign(one)
    assert host.left() == (0, 0)
    assert host.accounts.total() == (200, 100)
    assert len(host.kept()) == 10
