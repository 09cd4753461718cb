"""Text that comes byte by byte: whole characters, up to a stop text, through hosts that fail in mid-sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import TooFewExpertsError
from node.model.next_token import GenerationConfig
from node.trainer.sampling import DOCUMENT_START, TextStream, TextWriter, bytes_of, ids_of, sample_text
from tests.support.counted_experts import counted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.model.generation import Generation
    from node.trainer.sampling import Tokens

STOPS = st.lists(st.binary(min_size=1, max_size=4), max_size=3)


def at_once(step: Callable[[Generation], Tokens], generation: Generation) -> Tokens:
    return step(generation)


def again(step: Callable[[Generation], Tokens], generation: Generation) -> Tokens:
    while True:
        try:
            return step(generation)
        except TooFewExpertsError:
            continue


def streamed(stream: TextStream, pieces: Sequence[bytes]) -> str:
    text = stream.beginning
    for piece in pieces:
        text += stream.add(piece)
        if stream.is_stopped:
            return text
    return text + stream.end()


@given(st.binary(max_size=20), st.lists(st.binary(max_size=5), max_size=10), STOPS)
@settings(deadline=None)
def test_pieces_of_a_text_make_the_whole_up_to_the_first_stop(
    prompt: bytes, pieces: list[bytes], stops: list[bytes]
) -> None:
    whole = b"".join(pieces)
    complete = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    end = min(complete)[1] if complete else len(whole)
    assert streamed(TextStream(prompt, stops), pieces) == (prompt + whole[:end]).decode("utf-8", "replace")


def test_no_more_is_held_back_than_may_begin_a_stop_or_a_character() -> None:
    stream = TextStream(b"caf\xc3", (b"END", b"\n\n"))
    assert stream.beginning == "caf"
    shown = [stream.add(bytes([byte])) for byte in b"\xa9 E\nEN.\n"]
    assert shown == ["é", " ", "", "E", "\n", "", "EN.", ""]
    assert not stream.is_stopped
    assert stream.add(b"\nmore") == ""
    assert stream.is_stopped


def test_an_id_is_a_byte_and_an_empty_prompt_begins_a_document() -> None:
    every = bytes(range(256))
    assert b"".join(map(bytes_of, ids_of(every))) == every
    assert ids_of(b"") == list(DOCUMENT_START)


MODEL: dict[str, Any] = {"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2}
CONFIG = GenerationConfig(max_new_tokens=30, seed=1)


def texts(prompts: Sequence[tuple[bytes, GenerationConfig]], stop: Sequence[bytes] = ()) -> list[str]:
    model, _ = counted_model(**MODEL)
    found = [""] * len(prompts)
    for pieces in TextWriter(model, prompts, at_once, stop):
        for piece in pieces:
            found[piece.index] += piece.text
    return found


def test_the_prompt_comes_first_before_anything_is_computed() -> None:
    model, experts = counted_model(**MODEL)
    steps = iter(TextWriter(model, [(b"The ", CONFIG), (b"A ", CONFIG)], at_once))
    assert [piece.text for piece in next(steps)] == ["The ", "A "]
    assert not experts.calls


def test_a_text_ends_before_its_stop_and_its_mates_go_on() -> None:
    prompts = [(b"The ", CONFIG), (b"A ", GenerationConfig(max_new_tokens=30, seed=2))]
    whole = texts(prompts)
    first = whole[0].removeprefix("The ")
    stop = next(char for char in first if char.isascii() and char not in whole[1])
    assert texts(prompts, [stop.encode()]) == ["The " + first.partition(stop)[0], whole[1]]


def test_the_last_piece_of_a_text_is_marked_and_gives_what_was_held_back() -> None:
    model, _ = counted_model(**MODEL)
    two = GenerationConfig(max_new_tokens=2, temperature=0.0)
    *before, last = TextWriter(model, [(b"ab", two)], at_once)
    assert [piece.is_last for (piece,) in before] == [False, False]
    assert last[0].is_last
    nothing = GenerationConfig(max_new_tokens=0)
    (pieces,) = TextWriter(model, [(b"a\xc3", nothing)], at_once)
    assert [(piece.text, piece.is_last) for piece in pieces] == [("a\ufffd", True)]


def test_too_few_experts_in_mid_sentence_cost_a_try_and_not_the_sentence() -> None:
    model, experts = counted_model(**MODEL)
    undisturbed = sample_text(model, b"The ", CONFIG, at_once)
    del experts.calls[:]
    experts.failing = {0, 11, 12, 20}
    assert sample_text(model, b"The ", CONFIG, again) == undisturbed
    assert len(experts.calls) > 2 * CONFIG.max_new_tokens
    del experts.calls[:]
    with pytest.raises(TooFewExpertsError):
        sample_text(model, b"The ", CONFIG, at_once)


def test_a_sample_repeats_with_its_seed() -> None:
    model, _ = counted_model(**MODEL)
    other = GenerationConfig(max_new_tokens=30, seed=2)
    first = sample_text(model, b"The ", CONFIG, at_once)
    assert first.startswith("The ")
    assert first == sample_text(model, b"The ", CONFIG, at_once) != sample_text(model, b"The ", other, at_once)
