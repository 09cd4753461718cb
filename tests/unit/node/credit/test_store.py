"""The receipts that a node keeps, and how they are read page by page."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from node.credit import store as store_module
from node.credit.store import ReceiptStore
from protocol import receipts_pb2 as pb
from protocol.receipts import MAX_RECEIPT_AGE_S, open_receipt
from tests.support.crediting import NOW_S, RECEIPT, RUN, minutes, signed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReceiptStore]:
    with closing(ReceiptStore(tmp_path, RUN, max_receipts=20)) as made:
        made.open()
        yield made


def put(store: ReceiptStore, messages: list[pb.SignedReceipt]) -> None:
    with store.transaction() as connection:
        for message in messages:
            store.put(connection, message, open_receipt(message).end_s)


def forget_old(store: ReceiptStore, now_s: float) -> None:
    with store.transaction() as connection:
        store.forget_old(connection, now_s)


def pages(store: ReceiptStore, after: int = 0) -> Iterator[pb.ReceiptPage]:
    while True:
        page = store.page(pb.CollectRequest(run_id=RUN, store=store.id, after=after))
        yield page
        after = page.next
        if not page.more:
            return


def test_receipts_come_once_each_in_bounded_pages_and_later_ones_after_the_cursor(
    store: ReceiptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PAGE_RECEIPTS", 3)
    messages = [signed(one) for one in minutes(7)]
    put(store, messages)
    put(store, messages[:4])
    read = list(pages(store))
    assert [len(page.receipts) for page in read] == [3, 3, 1]
    assert [one for page in read for one in page.receipts] == messages
    assert not next(pages(store, read[-1].next)).receipts
    put(store, [signed()])
    (later,) = pages(store, read[-1].next)
    assert list(later.receipts) == [signed()]


def test_who_counts_in_another_store_begins_at_the_first(store: ReceiptStore) -> None:
    put(store, [signed()])
    for request in (pb.CollectRequest(after=1), pb.CollectRequest(store=bytes(16), after=1 << 63)):
        assert len(store.page(request).receipts) == 1
    assert not store.page(pb.CollectRequest(store=store.id, after=(1 << 64) - 1)).receipts


def test_a_store_stays_the_same_over_a_restart_and_each_run_has_its_own(store: ReceiptStore, tmp_path: Path) -> None:
    put(store, [signed()])
    with closing(ReceiptStore(tmp_path, RUN)) as again, closing(ReceiptStore(tmp_path, "other-0123456789ab")) as other:
        again.open()
        other.open()
        assert (again.id, len(again.id)) == (store.id, 16)
        assert other.id != store.id
        assert [len(page.receipts) for one in (again, other) for page in pages(one)] == [1, 0]


def test_a_damaged_store_is_begun_anew_under_another_id(store: ReceiptStore, tmp_path: Path) -> None:
    put(store, [signed()])
    before = store.id
    store.close()
    (tmp_path / "credit" / f"{RUN}.sqlite").write_bytes(b"damaged" * 1000)
    store.open()
    assert store.id != before
    assert not next(pages(store)).receipts


def test_what_is_too_old_goes_and_the_oldest_of_too_many(store: ReceiptStore) -> None:
    old, *young = minutes(30)
    put(store, [signed(one) for one in (old, *young)])
    forget_old(store, NOW_S)
    kept = [open_receipt(one) for page in pages(store) for one in page.receipts]
    assert kept == young[-20:]
    forget_old(store, young[-2].end_s + MAX_RECEIPT_AGE_S + 1)
    assert [open_receipt(one) for page in pages(store) for one in page.receipts] == young[-1:]


def test_a_receipt_is_found_by_what_is_signed(store: ReceiptStore) -> None:
    put(store, [signed()])
    claim = signed()
    claim.host_signature = b""
    with store.transaction() as connection:
        assert store.find(connection, claim) == signed()
        assert store.find(connection, pb.SignedReceipt(receipt=b"other")) is None
    assert open_receipt(signed()) == RECEIPT
