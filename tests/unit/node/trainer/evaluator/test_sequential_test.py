"""The acceptance test on simulated held-out texts: how often it is wrong, what it cannot be talked into, when it stops.

A text is a population of windows with a known mean gain; its windows come in a random order, as in the product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, InvalidInputError
from node.trainer.evaluator.sequential_test import SequentialTest, SequentialTestConfig, decide

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_WINDOWS = 400
SPREAD = 1e-3  # nats per token, the standard deviation of a window's gain
SHAPES = ("normal", "heavy tails", "heavy lower tail", "documents alike")
HARDEST = SequentialTestConfig(pilot=32, worth=0.0)  # no early way out for updates that gain nothing


def text(shape: str, mean: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Gains of a whole text's windows, in the order of the text; their mean is exact."""
    if shape == "normal":
        gains = generator.normal(size=N_WINDOWS)
    elif shape == "heavy tails":
        gains = generator.standard_t(3, N_WINDOWS)
    elif shape == "heavy lower tail":
        gains = -generator.exponential(size=N_WINDOWS)
    else:
        steps = generator.normal(size=N_WINDOWS)
        gains = np.convolve(steps, 0.9 ** np.arange(30.0))[:N_WINDOWS]
    standard: NDArray[np.float64] = (gains - gains.mean()) / gains.std()
    return mean + SPREAD * standard


def verdicts(shape: str, mean: float, n: int, config: SequentialTestConfig) -> list[str]:
    generator = np.random.default_rng(SHAPES.index(shape))
    texts = (generator.permutation(text(shape, mean, generator)) for _ in range(n))
    return [decide(gains, N_WINDOWS, config).verdict for gains in texts]


def accepted_by_peeking(gains: NDArray[np.float64], after: int) -> bool:
    """What people do: look at a t statistic after every window, stop when it is good."""
    n = np.arange(1, len(gains) + 1)
    means = np.cumsum(gains) / n
    deviations = np.sqrt(np.maximum(np.cumsum(gains**2) / n - means**2, 1e-30))
    return bool((means / deviations * np.sqrt(n) > 1.645)[after:].any())


@pytest.mark.parametrize("shape", SHAPES)
def test_at_most_one_in_twenty_updates_without_gain_is_accepted_and_none_waits_for_ever(shape: str) -> None:
    found = verdicts(shape, -1e-9, 200, HARDEST)
    assert found.count("accept") <= 0.05 * 200
    assert "undecided" not in found  # at the end of the text its mean is known


def test_the_same_updates_would_often_be_accepted_by_looking_at_a_t_statistic_after_each_window() -> None:
    generator = np.random.default_rng(0)
    texts = [generator.permutation(text("normal", -1e-9, generator)) for _ in range(200)]
    assert sum(accepted_by_peeking(gains, 32) for gains in texts) > 0.1 * 200


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_worth_having_are_accepted_after_a_part_of_the_text(shape: str) -> None:
    generator = np.random.default_rng(SHAPES.index(shape))
    texts = [generator.permutation(text(shape, SPREAD / 2, generator)) for _ in range(40)]
    found = [decide(gains, N_WINDOWS, SequentialTestConfig(pilot=32)) for gains in texts]
    assert [d.verdict for d in found].count("accept") >= 35
    assert np.median([d.n_windows for d in found]) < N_WINDOWS / 2


def test_updates_that_harm_are_rejected_after_a_part_of_the_text() -> None:
    generator = np.random.default_rng(0)
    texts = [generator.permutation(text("normal", -SPREAD / 2, generator)) for _ in range(40)]
    found = [decide(gains, N_WINDOWS, SequentialTestConfig(pilot=32)) for gains in texts]
    assert {d.verdict for d in found} == {"reject"}
    assert np.median([d.n_windows for d in found]) < N_WINDOWS / 3


def test_the_interval_holds_the_mean_whenever_it_is_looked_at() -> None:
    generator, misses = np.random.default_rng(0), 0
    for _ in range(60):
        gains = generator.permutation(text("heavy tails", 2e-4, generator))
        test = SequentialTest(SequentialTestConfig(pilot=32), N_WINDOWS)
        missed = False
        for place, gain in enumerate(gains):
            test.add(gain)
            # A gain above the bound counts as the bound, so only the lower end is promised.
            missed |= place % 40 == 0 and test.decision().low > 2e-4 + 1e-12
        misses += missed
        assert test.decision().low == test.decision().high == pytest.approx(2e-4)
    assert misses <= 0.05 * 60


@given(st.integers(0, 1 << 32), st.floats(1e-6, 1e3))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_the_loss_changes_nothing(seed: int, unit: float) -> None:
    generator = np.random.default_rng(seed)
    gains = generator.permutation(text("normal", 3e-4, generator))
    found = decide(gains, N_WINDOWS, SequentialTestConfig(pilot=32, margin=1e-4, worth=2e-4))
    other = decide(gains * unit, N_WINDOWS, SequentialTestConfig(pilot=32, margin=1e-4 * unit, worth=2e-4 * unit))
    assert (found.verdict, found.n_windows) == (other.verdict, other.n_windows)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_loss_whatever_is_accepted_without_finite_numbers(gains: list[float]) -> None:
    decision = decide(gains, 1000, SequentialTestConfig(pilot=4))
    assert decision.verdict != "accept" or all(math.isfinite(g) for g in gains[: decision.n_windows])
    assert not math.isnan(decision.low)
    assert not math.isnan(decision.high)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_rejects_at_once(broken: float) -> None:
    decision = decide([0.1, broken, 0.1], 1000, SequentialTestConfig(pilot=64))
    assert (decision.verdict, decision.n_windows) == ("reject", 2)
    assert "finite" in decision.why


def test_one_window_far_worse_than_all_before_rejects_an_update_that_gained() -> None:
    gains = [1e-4, 2e-4] * 8
    decision = decide([*gains, -1.0, *gains], 10_000, SequentialTestConfig(pilot=8))
    assert (decision.verdict, decision.n_windows) == ("reject", 17)
    assert "a window became worse by 1 nats per token" in decision.why


def test_one_window_far_better_than_all_before_does_not_make_up_for_the_others() -> None:
    harms = [-1e-4, -2e-4] * 60
    decision = decide([*harms[:20], 100.0, *harms], 10_000, SequentialTestConfig(pilot=8))
    assert decision.verdict == "reject"


def test_nothing_is_decided_before_the_pilot_has_ended() -> None:
    test = SequentialTest(SequentialTestConfig(pilot=16), 1000)
    for _ in range(16):
        test.add(1.0)
        assert test.decision().verdict == "undecided"


@pytest.mark.parametrize("worth", [0.0, 2e-5])
def test_an_expert_that_is_as_it_was_is_never_accepted(worth: float) -> None:
    assert decide([0.0] * 200, 200, SequentialTestConfig(worth=worth)).verdict == "reject"
    assert decide([0.0] * 100, 200, SequentialTestConfig(worth=worth)).verdict == "undecided"


def test_windows_that_an_expert_seldom_meets_do_not_make_the_first_change_look_too_large() -> None:
    generator = np.random.default_rng(0)
    gains = np.zeros(4000)
    gains[::10] = text("normal", SPREAD / 2, generator)
    found = decide(generator.permutation(gains), 4000, SequentialTestConfig(pilot=32))
    assert found.verdict == "accept"
    assert found.n_windows < 2000


def test_a_stream_that_ends_early_leaves_it_undecided() -> None:
    generator = np.random.default_rng(0)
    decision = decide(generator.normal(size=20) * SPREAD, N_WINDOWS, SequentialTestConfig(pilot=16))
    assert (decision.verdict, decision.n_windows) == ("undecided", 20)


def test_no_more_windows_are_taken_than_there_are() -> None:
    test = SequentialTest(SequentialTestConfig(pilot=1), 2)
    test.add(0.1)
    test.add(0.1)
    with pytest.raises(InvalidInputError, match="2 windows"):
        test.add(0.1)
    with pytest.raises(InvalidInputError, match="n_total"):
        SequentialTest(SequentialTestConfig(pilot=64), 64)


def undetected_share(n_windows: int, alpha: float) -> float:
    """Share of windows worse than the bound above which `n_windows` of them miss all with a probability below alpha."""
    return 1.0 - math.exp(math.log(alpha) / n_windows)


def test_windows_that_are_never_met_are_few() -> None:
    share = undetected_share(300, 0.05)
    assert (1 - share) ** 300 == pytest.approx(0.05)
    assert share < 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": math.nan},
        {"margin": 1.0},
        {"worth": math.inf},
        {"pilot": 0},
        {"spread": 1.0},
    ],
)
def test_a_setting_that_makes_no_test_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SequentialTestConfig(**wrong)


@pytest.mark.parametrize(("mean", "verdict"), [(-1e-3, "reject"), (0.0, "reject"), (1e-3, "accept")])
def test_the_interval_and_the_verdict_say_the_same(mean: float, verdict: str) -> None:
    generator = np.random.default_rng(0)
    config = SequentialTestConfig(pilot=32, margin=0.0, worth=1e-4)
    decision = decide(generator.permutation(text("normal", mean, generator)), N_WINDOWS, config)
    assert decision.n_windows < N_WINDOWS, "it was decided early"
    assert decision.verdict == verdict
    assert (decision.low >= config.margin) == (decision.verdict == "accept")
    assert (decision.high <= config.worth) == (decision.verdict == "reject")
