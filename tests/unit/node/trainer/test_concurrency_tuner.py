"""How many micro-batches are in flight, over networks whose speed follows from that number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from node.trainer.concurrency_tuner import FEWEST, MOST_REST_ROUNDS, ROUND_STEPS, ConcurrencyTuner

if TYPE_CHECKING:
    from collections.abc import Callable


def steps(concurrency_tuner: ConcurrencyTuner, speed: Callable[[int], float], rounds: int) -> list[int]:
    """The number in flight of each round."""
    numbers = []
    for _ in range(rounds):
        numbers.append(concurrency_tuner.in_flight)
        for _ in range(ROUND_STEPS):
            concurrency_tuner.learn(speed(concurrency_tuner.in_flight))
    return numbers


def test_a_slow_network_keeps_all_in_flight() -> None:
    numbers = steps(ConcurrencyTuner(32), lambda n: 10.0 * n, 100)
    assert numbers[0] == 32
    assert set(numbers) == {32, 16}
    assert numbers.count(32) > 0.8 * len(numbers)


def test_a_quick_network_needs_the_fewest() -> None:
    numbers = steps(ConcurrencyTuner(32), lambda n: 1000.0 - n, 100)
    assert [number for at, number in enumerate(numbers[:20]) if number not in numbers[:at]] == [32, 16, 8, 4, 2]
    assert numbers.count(FEWEST) > 0.7 * len(numbers)


@pytest.mark.parametrize("enough", [4, 8, 16])
def test_the_fewest_that_are_as_fast_as_more_are_kept(enough: int) -> None:
    numbers = steps(ConcurrencyTuner(64), lambda n: float(min(n, enough)), 200)
    assert max(set(numbers), key=numbers.count) == enough
    assert numbers[-50:].count(enough) > 40


def test_a_network_that_becomes_slow_is_noticed_within_the_longest_rest() -> None:
    concurrency_tuner = ConcurrencyTuner(32)
    steps(concurrency_tuner, lambda _: 100.0, 100)
    assert FEWEST in steps(concurrency_tuner, lambda _: 100.0, MOST_REST_ROUNDS)
    numbers = steps(concurrency_tuner, lambda n: 10.0 * n, 3 * MOST_REST_ROUNDS)
    assert numbers[-1] >= 16
    assert 32 in numbers


@pytest.mark.parametrize(("most", "fixed", "wanted"), [(1, 0, 1), (2, 0, 2), (8, 3, 3), (8, 12, 8)])
def test_what_is_fixed_or_cannot_be_fewer_stays(most: int, fixed: int, wanted: int) -> None:
    assert set(steps(ConcurrencyTuner(most, fixed), lambda _: 1.0, 20)) == {wanted}
