"""Which sequences a pretrained model reads in one pass, and which are worth another pass."""

from __future__ import annotations

import pytest

from node.model.attention_cache import Stretch
from node.model.pretrained_cache import passes_of


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([1], [[0]]),
        ([1] * 16, [list(range(16))]),
        ([1, 20, 1], [[0, 1, 2]]),
        ([1, 512, 1, 1], [[1], [0, 2, 3]]),
        ([64, 60, 1, 64, 1, 70], [[0, 1, 3, 5], [2, 4]]),
        ([600, 300, 80, 10], [[0], [1], [2], [3]]),
        ([400, 600, 500], [[0, 1, 2]]),
    ],
)
def test_stretches_of_like_length_share_a_pass_and_a_long_one_pads_no_short_ones(
    lengths: list[int], passes: list[list[int]]
) -> None:
    stretches = [
        Stretch(place=place, window=range(1000), start=place, stop=place + length)
        for place, length in enumerate(lengths)
    ]
    assert passes_of(stretches) == passes


def test_padding_is_never_more_than_a_fourth_of_the_pass_or_than_what_another_pass_costs() -> None:
    lengths = [3 * n % 997 + 1 for n in range(300)]
    stretches = [Stretch(place=n, window=range(1000), start=0, stop=length) for n, length in enumerate(lengths)]
    passes = passes_of(stretches)
    assert sorted(index for group in passes for index in group) == list(range(300))
    for group in passes:
        read = [lengths[index] for index in group]
        assert len(read) * max(read) - sum(read) <= max(48, len(read) * max(read) / 4)
    assert len(passes) < 12
