"""What experts tell of labels, beside what they would tell of labels that mean nothing."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from node.trainer.inspection.information import excess, middle, mutual_information_bits, shuffled_bits


def test_mutual_information_of_equal_labels_is_their_entropy_and_of_independent_ones_nothing() -> None:
    labels = np.arange(4).repeat(100)
    assert mutual_information_bits(labels, labels) == pytest.approx(2.0)
    assert mutual_information_bits(labels, np.tile(np.arange(4), 100)) == pytest.approx(0.0, abs=1e-12)


def test_many_experts_seem_to_know_labels_that_mean_nothing_and_shuffling_shows_it() -> None:
    rng = np.random.default_rng(0)
    experts_RM, labels_R = rng.integers(500, size=(400, 4)), rng.integers(8, size=400)
    nothing = excess(experts_RM, labels_R, rng)
    assert nothing["bits"] > 1.0
    assert nothing["bits"] == pytest.approx(nothing["shuffled_bits"], abs=5 * nothing["shuffled_std"])
    known = excess(np.repeat(labels_R[:, None], 4, axis=1), labels_R, rng)
    assert known["bits"] > known["shuffled_bits"] + 5 * known["shuffled_std"]


def test_mutual_information_is_that_of_the_counts() -> None:
    # Of eight pairs expert 0 has labels 0, 0, 0, 1 and expert 1 labels 1, 1, 1, 0: joint 3/8 and 1/8, margins 1/2.
    expert_P, label_P = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    by_hand = 2 * 3 / 8 * np.log2(3 / 8 / (1 / 4)) + 2 * 1 / 8 * np.log2(1 / 8 / (1 / 4))
    assert mutual_information_bits(expert_P, label_P) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.18872, abs=1e-5)


def test_one_seed_shuffles_alike_and_whole_rows_keep_one_label() -> None:
    expert_RM, label_R = np.repeat(np.arange(8)[:, None], 3, axis=1), np.arange(8)
    first, second = (list(islice(shuffled_bits(expert_RM, label_R, np.random.default_rng(7)), 5)) for _ in range(2))
    assert first == second
    assert first == pytest.approx([3.0] * 5), "each row has an expert of its own, so any label of it is foretold"


def test_the_middle_leaves_out_as_much_on_either_side() -> None:
    assert middle([float(n) for n in range(1001)]) == pytest.approx((25.0, 975.0))
