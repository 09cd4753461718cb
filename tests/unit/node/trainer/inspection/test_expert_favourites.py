"""What single experts are chosen for: tokens and places, from pairs that are counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.tokenizer import ByteTokenizer, FileTokenizer
from node.trainer.inspection.experts import (
    CHARS_AFTER,
    CHARS_BEFORE,
    Favourite,
    context_of,
    favourites,
    places,
    token_text,
)
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_an_experts_favourites_are_counted_and_compared_with_all_pairs() -> None:
    # Expert 0: labels 5, 5, 5, 1. Expert 1: labels 1, 1, 1, 1. So label 5 is 3/8 of all, label 1 is 5/8.
    expert_P, label_P = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([5, 5, 5, 1, 1, 1, 1, 1])
    found = favourites(expert_P, label_P, [0, 1, 2], 3)
    assert found[0] == [Favourite(label=5, pairs=3, share=0.75, times=2.0)], "it has label 1 less often than others"
    assert found[1] == [Favourite(label=1, pairs=4, share=1.0, times=1.6)]
    assert found[2] == [], "it was not chosen"


def test_a_label_that_was_seen_once_does_not_come_before_one_that_is_often() -> None:
    # Expert 0 has all of label 7 (20 of 100 pairs) and the only pair of label 9; both are 2 times as often.
    expert_P = np.repeat([0, 1], 50)
    label_P = np.array([7] * 20 + [9] + [0] * 29 + [0] * 50)
    first, second = favourites(expert_P, label_P, [0], 2)[0]
    assert (first.label, second.label) == (7, 9)
    assert first.times == second.times == 2.0
    assert first.share * math.log(first.times) > second.share * math.log(second.times)


def test_experts_that_choose_alike_have_what_is_frequent_first() -> None:
    expert_P, label_P = np.repeat([0, 1], 4), np.array([3, 3, 3, 2] * 2)
    assert [favourite.label for favourite in favourites(expert_P, label_P, [1], 5)[1]] == [3, 2]


def test_nothing_was_chosen_and_nothing_is_found() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert favourites(nothing, nothing, [0], 3) == {0: []}
    assert places(nothing, [0], 3)[0].tolist() == []


def test_places_are_spread_over_all_that_an_expert_has() -> None:
    expert_P = np.array([1, 0] * 50)
    found = places(expert_P, [0, 1, 2], 5)
    assert found[1].tolist() == [10, 30, 50, 70, 90]
    assert found[0].tolist() == [11, 31, 51, 71, 91]
    assert found[2].tolist() == []
    assert places(np.array([4, 4]), [4], 5)[4].tolist() == [0, 1]


def test_a_context_is_the_token_with_a_little_text_around_it() -> None:
    text = b"It was the best of times, it was the worst of times, it was the age of wisdom"
    place = text.index(b"worst")
    context = context_of(np.frombuffer(text, dtype=np.uint8).astype(np.int64), place, ByteTokenizer())
    assert (context.before, context.token, context.after) == ("mes, it was the ", "w", "orst of ")
    assert (len(context.before), len(context.after)) == (CHARS_BEFORE, CHARS_AFTER)


def test_a_context_at_the_edges_of_a_window_is_what_there_is() -> None:
    ids_T = np.frombuffer(b"ab", dtype=np.uint8).astype(np.int64)
    first, last = (context_of(ids_T, place, ByteTokenizer()) for place in (0, 1))
    assert (first.before, first.token, first.after) == ("", "a", "b")
    assert (last.before, last.token, last.after) == ("a", "b", "")


@pytest.mark.parametrize(("token", "text"), [(ord("a"), "a"), (0xE2, "\\xe2"), (27, "\x1b")])
def test_a_byte_that_is_no_text_of_its_own_is_written_as_a_number(token: int, text: str) -> None:
    assert token_text(ByteTokenizer(), token) == text


def test_a_context_of_pieces_of_words_is_their_text() -> None:
    tokenizer = FileTokenizer(tiny_tokenizer(), "a test")
    ids_T = tokenizer.encode([b"the swarm trains many tiny experts"])[0].astype(np.int64)
    context = context_of(ids_T, 2, tokenizer)
    assert (context.before + context.token + context.after).startswith("the swarm")
