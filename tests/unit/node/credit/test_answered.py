"""Counting what peers answer, for several that take it at their own pace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from node.credit import answered
from node.credit.answered import AnsweredPairs, PairCounts

if TYPE_CHECKING:
    import pytest


def test_each_taker_gets_everything_that_was_counted_since_its_last_take() -> None:
    pairs = AnsweredPairs()
    first = pairs.taker()
    pairs.add("a", PairCounts(forward=3))
    second = pairs.taker()
    pairs.add("a", PairCounts(backward=2))
    pairs.add("b", PairCounts(forward=1))
    assert first.take() == {"a": PairCounts(3, 2), "b": PairCounts(1, 0)}
    assert second.take() == {"a": PairCounts(0, 2), "b": PairCounts(1, 0)}
    assert first.take() == second.take() == {}


def test_threads_lose_no_count() -> None:
    pairs = AnsweredPairs()
    taker = pairs.taker()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: pairs.add("a", PairCounts(1, 2)), range(1000)))
    assert taker.take() == {"a": PairCounts(1000, 2000)}


def test_no_number_of_peers_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered, "MAX_PEERS_COUNTED", 2)
    pairs = AnsweredPairs()
    taker = pairs.taker()
    for peer_id in ("a", "b", "c", "a"):
        pairs.add(peer_id, PairCounts(forward=1))
    assert taker.take() == {"a": PairCounts(2, 0), "b": PairCounts(1, 0)}
    pairs.add("c", PairCounts(forward=1))
    assert taker.take() == {"c": PairCounts(1, 0)}


def test_counts_add_up_and_are_capped_each_for_itself() -> None:
    assert PairCounts(1, 2).plus(PairCounts(3, 4)) == PairCounts(4, 6)
    assert PairCounts(1, 9).at_most(PairCounts(5, 5)) == PairCounts(1, 5)
