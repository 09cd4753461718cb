"""Tokens of a text are told with the text that they are of: none twice, none of what a stop text cuts off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from common.tokenizer import ByteTokenizer
from node.api.written_text import WrittenText
from node.model.generation import NewToken, Prompt
from node.model.next_token import GenerationConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.api.written_text import Piece, ToldToken
    from node.model.generation import Finish

IN_BYTES = ByteTokenizer()


def pieces(written: str, stop: Sequence[str] = (), prompt: str = "") -> list[Piece]:
    """Those of a text whose tokens are the bytes of `written`, up to the last one that is needed."""
    tokens, data = list(prompt.encode()), written.encode()
    text = WrittenText(3, Prompt(ids=tokens or [0], config=GenerationConfig()), IN_BYTES.stream(), tokens, stop)
    found = []
    for at, byte in enumerate(data):
        finish: Finish | None = "length" if at == len(data) - 1 else None
        new = NewToken(sequence=0, token=byte, log_probability=-float(at), finish=finish)
        found.append(text.take(new, {"peer": at}))
        if found[-1].finish:
            break
    return found


@given(st.text(min_size=1, max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_each_token_is_told_once_in_its_order_and_begins_in_the_text_that_was_told(text: str, stop: list[str]) -> None:
    found = pieces(text, stop)
    said = ""
    told: list[ToldToken] = []
    for piece in found:
        said += piece.text
        told += piece.tokens
        assert all(token.offset <= len(said) for token in piece.tokens)
    assert [token.new.token for token in told] == list(text.encode())[: len(told)]
    starts = [len(text.encode()[:at].decode("utf-8", "ignore")) for at in range(len(told))]
    assert [token.offset for token in told] == starts
    assert text.startswith(said)
    if found[-1].finish == "length":
        assert said == text
        assert len(told) == len(text.encode())
    else:
        assert all(token.offset < len(said) for token in told)
        assert len(told) == len(said.encode())


def test_what_may_be_a_stop_is_held_back_with_its_tokens() -> None:
    found = pieces("abENcd", ["END"])
    assert [piece.text for piece in found] == ["a", "b", "", "", "ENc", "d"]
    assert [len(piece.tokens) for piece in found] == [1, 1, 0, 0, 3, 1]
    assert {piece.index for piece in found} == {3}
    assert [piece.answered["peer"] for piece in found] == list(range(6))


def test_a_stop_ends_the_text_before_it() -> None:
    found = pieces("abENDcd", ["END"])
    assert "".join(piece.text for piece in found) == "ab"
    assert found[-1].finish == "stop"
    assert len(found) == 5
    assert sum(len(piece.tokens) for piece in found) == 2


def test_a_stop_that_is_the_last_token_too_is_the_reason_that_is_told() -> None:
    assert pieces("a.", ["."])[-1].finish == "stop"


def test_the_prompt_is_the_beginning_and_stops_nothing() -> None:
    text = WrittenText(0, Prompt(ids=[1], config=GenerationConfig()), IN_BYTES.stream(), list(b"so. "), ["."])
    assert text.beginning == "so. "
    piece = text.take(NewToken(sequence=0, token=ord("a"), log_probability=0.0, finish="length"), {})
    assert (piece.text, piece.finish) == ("a", "length")
    assert piece.tokens[0].offset == 0
