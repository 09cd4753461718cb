"""What counts of all that was collected: each receipt once, no second twice, in whatever order they come."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, StorageError
from coordinator.credit import ledger as ledger_module
from coordinator.credit.ledger import KEPT_S, Ledger
from protocol.receipts import MAX_INTERVAL_S
from tests.support.crediting import HOST, NOW_S, RECEIPT, RUN, STRANGER, TRAINER, minutes, receipt
from tests.support.ledgers import STORE, both, checked, credited, ledger_in, sums_of, take

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from protocol.receipts import Receipt


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with ledger_in(tmp_path, both()) as made:
        yield made


def at(start_s: int, seconds: int = 60, nonce: int = 0, pairs: int = 1) -> Receipt:
    """One that begins so long after the day began."""
    start_s += NOW_S - 86_400
    return receipt(
        start_s=start_s,
        end_s=start_s + seconds,
        nonce=nonce.to_bytes(16, "big"),
        forward_pairs=2 * pairs,
        backward_pairs=pairs,
    )


def that_count(receipts: Sequence[Receipt]) -> list[Receipt]:
    """The rule, in its shortest form."""
    until_s, found = 0, []
    for one in sorted(set(receipts), key=lambda one: (one.start_s, one.nonce, checked(one).digest)):
        if one.start_s >= until_s:
            found.append(one)
            until_s = one.end_s
    return found


def test_receipts_add_up(ledger: Ledger) -> None:
    assert take(ledger, minutes(5)) == 5
    assert credited(ledger) == (10_000, 5_000, 5)


def test_the_same_receipt_counts_once_whoever_sends_it_and_however_often(ledger: Ledger) -> None:
    assert take(ledger, [RECEIPT, RECEIPT]) == 1
    assert take(ledger, [RECEIPT], TRAINER) == 0
    assert credited(ledger) == (2000, 1000, 1)


def test_of_two_that_overlap_the_one_that_begins_earlier_counts(ledger: Ledger) -> None:
    take(ledger, [at(30, pairs=5)])
    assert credited(ledger) == (10, 5, 1)
    take(ledger, [at(0)])
    assert credited(ledger) == (2, 1, 1)
    take(ledger, [at(59, pairs=7), at(90, pairs=100)])
    assert credited(ledger) == (202, 101, 2)


def test_of_two_that_begin_together_the_one_with_the_smaller_nonce_counts(ledger: Ledger) -> None:
    take(ledger, [at(0, nonce=2, pairs=5)])
    take(ledger, [at(0, nonce=3, pairs=9), at(0, nonce=1, pairs=7)])
    assert credited(ledger) == (14, 7, 1)


def test_one_that_comes_late_frees_what_its_rival_had_kept_out(ledger: Ledger) -> None:
    take(ledger, [at(50, pairs=10), at(100, pairs=100)])
    assert credited(ledger) == (20, 10, 1)
    take(ledger, [at(0)])
    assert credited(ledger) == (202, 101, 2)


def test_receipts_of_other_pairs_do_not_overlap(ledger: Ledger) -> None:
    other = receipt(host=STRANGER.public_key)
    take(ledger, [RECEIPT, other])
    assert sums_of(ledger).unseen_receipts == 1
    assert credited(ledger) == (2000, 1000, 1)


RECEIPTS = st.builds(
    at,
    st.integers(0, 300),
    st.integers(1, MAX_INTERVAL_S),
    st.integers(0, 2),
    st.integers(1, 1 << 20),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(receipts=st.lists(RECEIPTS, max_size=14), cuts=st.lists(st.integers(0, 14), max_size=4), rng=st.randoms())
def test_what_counts_does_not_depend_on_the_order_or_on_the_pages(
    tmp_path_factory: pytest.TempPathFactory, receipts: list[Receipt], cuts: list[int], rng: random.Random
) -> None:
    shuffled = [*receipts, *receipts[:3]]
    rng.shuffle(shuffled)
    bounds = [0, *sorted(cuts), len(shuffled)]
    expected = that_count(receipts)
    with ledger_in(tmp_path_factory.mktemp("ledger"), both()) as ledger:
        for begin, end in pairwise(bounds):
            take(ledger, shuffled[begin:end])
        forward, backward = (sum(getattr(one, f"{way}_pairs") for one in expected) for way in ("forward", "backward"))
        assert credited(ledger) == (forward, backward, len(expected))


def test_a_ledger_goes_on_after_a_restart_and_remembers_how_far_each_peer_was_read(
    ledger: Ledger, tmp_path: Path
) -> None:
    assert ledger.place(HOST.peer_id) == (b"", 0)
    ledger.take([checked(RECEIPT)], HOST.peer_id, STORE, 77)
    with ledger_in(tmp_path) as again:
        assert again.place(HOST.peer_id) == (STORE, 77)
        assert again.place(STRANGER.peer_id) == (b"", 0)
        assert take(again, [RECEIPT]) == 0
        assert credited(again) == (2000, 1000, 1)


def test_two_processes_may_write_to_one_ledger(ledger: Ledger, tmp_path: Path) -> None:
    with ledger_in(tmp_path) as other:
        for one in minutes(4):
            assert take(ledger, [one]) + take(other, [one]) == 1
    assert credited(ledger) == (8000, 4000, 4)


def test_a_ledger_belongs_to_one_run(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path, "other-0123456789ab")
    with pytest.raises(ConfigError, match=f"holds what was collected of run {RUN}; name another folder"):
        other.open()
    other.close()


def test_sums_stay_when_receipts_are_forgotten(ledger: Ledger) -> None:
    take(ledger, minutes(10))
    ledger.forget_old(minutes(10)[5].start_s + KEPT_S)
    with ledger.reading() as connection:
        assert connection.execute("SELECT count(*) FROM receipts").fetchone() == (5,)
    assert take(ledger, minutes(10)) == 0  # those that were forgotten do not count again, whatever the clock says now
    assert credited(ledger) == (20_000, 10_000, 10)


def test_a_full_ledger_says_so_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = ledger_module._SCHEMA.replace("max_page_count = 1048576", "max_page_count = 40")
    assert schema != ledger_module._SCHEMA
    monkeypatch.setattr(ledger_module, "_SCHEMA", schema)
    with ledger_in(tmp_path, both()) as ledger:
        take(ledger, minutes(10))
        with pytest.raises(StorageError, match="full"):
            take(ledger, minutes(5000))
        assert credited(ledger) == (20_000, 10_000, 10)
