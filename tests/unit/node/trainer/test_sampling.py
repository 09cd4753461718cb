"""Text that comes byte by byte: whole characters, up to a stop text, through hosts that fail in mid-sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import TooFewExpertsError
from common.tokenizer import ByteTokenizer, FileTokenizer
from node.model.next_token import GenerationConfig
from node.trainer.sampling import TextUpToStop, TextWriter, sample_text
from tests.support.counted_experts import counted_model
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.tokenizer import Tokenizer
    from node.model.generation import Generation
    from node.trainer.sampling import NewTokens

STOPS = st.lists(st.text(min_size=1, max_size=4), max_size=3)
TOKENIZER = FileTokenizer(tiny_tokenizer(), "tiny")
IN_BYTES = ByteTokenizer()


def at_once(step: Callable[[Generation], NewTokens], generation: Generation) -> NewTokens:
    return step(generation)


def again(step: Callable[[Generation], NewTokens], generation: Generation) -> NewTokens:
    while True:
        try:
            return step(generation)
        except TooFewExpertsError:
            continue


def streamed(text: TextUpToStop, tokens: Sequence[int]) -> str:
    shown = text.beginning
    for token in tokens:
        shown += text.add(token)
        if text.is_stopped:
            return shown
    return shown + text.end()


def up_to_stop(whole: str, stops: Sequence[str]) -> str:
    complete = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    return whole[: min(complete)[1]] if complete else whole


@pytest.mark.parametrize("tokenizer", [IN_BYTES, TOKENIZER], ids=["bytes", "tokenizer"])
@given(st.text(max_size=20), st.text(max_size=30), STOPS)
@settings(deadline=None)
def test_tokens_of_a_text_make_the_whole_up_to_the_first_stop(
    tokenizer: Tokenizer, prompt: str, text: str, stops: list[str]
) -> None:
    prompt_tokens, tokens = (found.tolist() for found in tokenizer.encode([prompt.encode(), text.encode()]))
    found = streamed(TextUpToStop(tokenizer.stream(), prompt_tokens, stops), tokens)
    assert found == prompt + up_to_stop(text, stops)


@given(st.binary(max_size=20), st.binary(max_size=30))
@settings(deadline=None)
def test_bytes_that_are_no_text_become_replacement_characters(prompt: bytes, data: bytes) -> None:
    assert streamed(TextUpToStop(IN_BYTES.stream(), prompt), data) == (prompt + data).decode("utf-8", "replace")


def test_no_more_is_held_back_than_may_begin_a_stop_or_a_character() -> None:
    text = TextUpToStop(IN_BYTES.stream(), b"caf\xc3", ("END", "\n\n"))
    assert text.beginning == "caf"
    shown = [text.add(byte) for byte in b"\xa9 E\nEN."]
    assert shown == ["é", " ", "", "E", "\n", "", "EN."]
    assert not text.is_stopped
    assert [text.add(byte) for byte in b"\n\n"] == ["", ""]
    assert text.is_stopped
    assert text.end() == ""


def test_a_character_that_is_cut_off_at_the_end_is_shown_as_one_that_is_missing() -> None:
    for tokenizer in (IN_BYTES, TOKENIZER):
        text, tokens = TextUpToStop(tokenizer.stream(), ()), tokenizer.encode(["a☃".encode()])[0].tolist()
        assert streamed(text, tokens[:-1]) == "a\ufffd"


MODEL: dict[str, Any] = {"gate": "hash", "gate_reads": "tokens", "gate_score": "softmax", "smear": 2}
CONFIG = GenerationConfig(max_new_tokens=30, seed=1)


def texts(
    prompts: Sequence[tuple[bytes, GenerationConfig]], stop: Sequence[str] = (), tokenizer: Tokenizer = IN_BYTES
) -> list[str]:
    model, _ = counted_model(**MODEL, tokenizer=tokenizer)
    found = [""] * len(prompts)
    for pieces in TextWriter(model, tokenizer, prompts, at_once, stop):
        for piece in pieces:
            found[piece.index] += piece.text
    return found


def test_the_prompt_comes_first_before_anything_is_computed() -> None:
    model, experts = counted_model(**MODEL)
    steps = iter(TextWriter(model, IN_BYTES, [(b"The ", CONFIG), (b"A ", CONFIG)], at_once))
    assert [piece.text for piece in next(steps)] == ["The ", "A "]
    assert not experts.calls


def test_a_text_ends_before_its_stop_and_its_mates_go_on() -> None:
    prompts = [(b"The ", CONFIG), (b"A ", GenerationConfig(max_new_tokens=30, seed=2))]
    whole = texts(prompts)
    first = whole[0].removeprefix("The ")
    stop = next(char for char in first if char.isascii() and char not in whole[1])
    assert texts(prompts, [stop]) == ["The " + first.partition(stop)[0], whole[1]]


def test_the_last_piece_of_a_text_is_marked_and_gives_what_was_held_back() -> None:
    model, _ = counted_model(**MODEL)
    two = GenerationConfig(max_new_tokens=2, temperature=0.0)
    *before, last = TextWriter(model, IN_BYTES, [(b"ab", two)], at_once)
    assert [piece.is_last for (piece,) in before] == [False, False]
    assert last[0].is_last
    nothing = GenerationConfig(max_new_tokens=0)
    (pieces,) = TextWriter(model, IN_BYTES, [(b"a\xc3", nothing)], at_once)
    assert [(piece.text, piece.is_last) for piece in pieces] == [("a\ufffd", True)]


def test_too_few_experts_in_mid_sentence_cost_a_try_and_not_the_sentence() -> None:
    model, experts = counted_model(**MODEL)
    undisturbed = sample_text(model, IN_BYTES, b"The ", CONFIG, at_once)
    del experts.calls[:]
    experts.failing = {0, 11, 12, 20}
    assert sample_text(model, IN_BYTES, b"The ", CONFIG, again) == undisturbed
    assert len(experts.calls) > 2 * CONFIG.max_new_tokens
    del experts.calls[:]
    with pytest.raises(TooFewExpertsError):
        sample_text(model, IN_BYTES, b"The ", CONFIG, at_once)


def test_a_sample_repeats_with_its_seed() -> None:
    model, _ = counted_model(**MODEL)
    other = GenerationConfig(max_new_tokens=30, seed=2)
    first = sample_text(model, IN_BYTES, b"The ", CONFIG, at_once)
    assert first.startswith("The ")
    assert sample_text(model, IN_BYTES, b"The ", CONFIG, at_once) == first
    assert sample_text(model, IN_BYTES, b"The ", other, at_once) != first


def test_a_model_of_tokens_writes_text() -> None:
    found = texts([(b"the swarm", CONFIG), (b"", CONFIG)], tokenizer=TOKENIZER)
    assert found[0].startswith("the swarm")
    assert len(found[0]) > len("the swarm")
    assert not found[1].startswith("\n\n")
    assert found == texts([(b"the swarm", CONFIG), (b"", CONFIG)], tokenizer=TOKENIZER)
