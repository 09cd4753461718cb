"""Credit as the page shows it, read beside the host that goes on counting and signing."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from common.errors import StorageError
from node.credit.answered import AnsweredPairs, PairCounts
from node.credit.store import FOLDER, ReceiptStore
from node.host.credit.accounts import SCHEMA, TrainerAccounts
from node.host.page import credit as module
from node.host.page.credit import CreditReader
from protocol.receipts import MAX_RECEIPT_AGE_S, sign_receipt
from tests.support.crediting import HOST, NOW_S, RUN, TRAINER, minutes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Host:
    """One that answers a trainer, whose claims it signs."""

    def __init__(self, folder: Path) -> None:
        self.answered, self.store = AnsweredPairs(), ReceiptStore(folder, RUN, SCHEMA)
        self.accounts = TrainerAccounts(HOST, RUN, self.store, self.answered.taker(), lambda: float(NOW_S))
        self.store.open()

    def answer(self, forward: int, backward: int) -> None:
        self.answered.add(TRAINER.peer_id, PairCounts(forward, backward))
        self.accounts.save()

    def sign_all(self, n_minutes: int) -> int:
        """Sign this many receipts; return the pairs of all."""
        total = 0
        for receipt in minutes(n_minutes):
            self.answer(receipt.forward_pairs, receipt.backward_pairs)
            self.accounts.countersign(sign_receipt(TRAINER, receipt), TRAINER.peer_id)
            total += receipt.forward_pairs + receipt.backward_pairs
        return total


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    with closing(made.store):
        yield made


def same_day(_seconds: float) -> str:
    return "2023-11-14"


def test_where_nothing_is_kept_nothing_is_shown(tmp_path: Path) -> None:
    assert CreditReader(tmp_path, RUN).read(NOW_S) is None


def test_what_is_answered_and_signed_is_added_up_once(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_RECEIPTS", 2)
    reader = CreditReader(tmp_path, RUN, same_day)
    host.answer(30, 12)
    found = reader.read(NOW_S)
    assert found is not None
    assert (found.answered, found.waiting, found.confirmed, found.receipts, found.first_s) == (42, 42, 0, 0, None)
    signed = host.sign_all(5)
    for _ in range(2):
        found = reader.read(NOW_S)
        assert found is not None
        assert (found.answered, found.waiting) == (42 + signed, 42)
        assert (found.confirmed, found.confirmed_today, found.receipts, found.trainers) == (signed, signed, 5, 1)
        assert found.first_s == next(iter(minutes(5))).start_s


def test_only_receipts_of_this_day_are_those_of_today(host: Host, tmp_path: Path) -> None:
    host.sign_all(3)
    reader = CreditReader(tmp_path, RUN, lambda seconds: "today" if seconds == NOW_S else "before")
    found = reader.read(NOW_S)
    assert found is not None
    assert found.confirmed_today == 0
    assert found.confirmed > 0


def test_what_the_host_has_forgotten_is_shown_no_longer(host: Host, tmp_path: Path) -> None:
    host.sign_all(3)
    reader = CreditReader(tmp_path, RUN)
    assert reader.read(NOW_S) is not None
    found = reader.read(NOW_S + MAX_RECEIPT_AGE_S + 2 * 86_400)
    assert found is not None
    assert (found.confirmed, found.receipts) == (0, 0)


def test_a_store_that_was_begun_anew_is_counted_anew(tmp_path: Path) -> None:
    reader = CreditReader(tmp_path, RUN, same_day)
    for _ in range(2):
        host = Host(tmp_path)
        with closing(host.store):
            signed = host.sign_all(2)
            found = reader.read(NOW_S)
            assert found is not None
            assert found.confirmed == signed
        for file in (tmp_path / FOLDER).iterdir():
            file.unlink()


def test_a_damaged_store_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / FOLDER / f"{RUN}.sqlite"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="is not a database"):
        CreditReader(tmp_path, RUN).read(NOW_S)
