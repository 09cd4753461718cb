"""Text is cut into tokens and put together again, whatever it is; a file that is no tokenizer is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.tokenizer import ByteTokenizer, FileTokenizer, token_dtype
from common.vocabulary import MAX_VOCABULARY
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = FileTokenizer(tiny_tokenizer(), "tiny")


@given(st.lists(st.text(), max_size=4))
def test_a_text_comes_back_as_it_was(texts: list[str]) -> None:
    raw = [text.encode() for text in texts]
    for tokenizer in (ByteTokenizer(), TOKENIZER):
        cut = tokenizer.encode(raw)
        assert [tokenizer.decode(tokens_L.tolist()) for tokens_L in cut] == raw
        assert all(tokens_L.max(initial=0) < tokenizer.vocab_size for tokens_L in cut)


@given(st.text())
def test_a_stream_gives_whole_characters_and_in_the_end_the_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), TOKENIZER):
        stream = tokenizer.stream()
        said = [stream.add(token) for token in tokenizer.encode([text.encode()])[0].tolist()]
        assert "".join(said) == text
        assert "�" not in "".join(said) or "�" in text


def test_words_that_it_knows_take_fewer_tokens_than_bytes() -> None:
    text = b"the swarm trains many tiny experts"
    assert len(TOKENIZER.encode([text])[0]) < len(text) / 3
    assert len(ByteTokenizer().encode([text])[0]) == len(text)


def test_bytes_that_are_no_text_are_kept_where_tokens_are_bytes_and_replaced_elsewhere() -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode([b"a\xff"])[0].tolist()) == b"a\xff"
    assert TOKENIZER.decode(TOKENIZER.encode([b"a\xff"])[0].tolist()) == "a�".encode()


def test_a_file_that_asks_to_cut_texts_short_or_to_fill_them_up_does_neither() -> None:
    file = json.loads(tiny_tokenizer())
    file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = FileTokenizer(json.dumps(file).encode(), "asking")
    assert tokenizer.decode(tokenizer.encode([b"many tiny experts"])[0].tolist()) == b"many tiny experts"


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', tiny_tokenizer()[:-9]], ids=range(6)
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"texts/tokenizer\.json: is no tokenizer\.json that the library tokenizers"):
        FileTokenizer(data, "texts/tokenizer.json")


@pytest.mark.parametrize("vocab", [{"a": 0}, {"a": 0, "b": MAX_VOCABULARY}], ids=["too few", "too many"])
def test_a_vocabulary_out_of_range_is_refused(vocab: dict[str, int]) -> None:
    data = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode()
    with pytest.raises(DataError, match=rf"tokens; a run can have 2 to {MAX_VOCABULARY:,}"):
        FileTokenizer(data, "wide")


@pytest.mark.parametrize(("n_tokens", "bits"), [(256, 8), (257, 16), (65_536, 16), (65_537, 32), (MAX_VOCABULARY, 32)])
def test_tokens_are_kept_in_the_smallest_type_that_holds_them(n_tokens: int, bits: int) -> None:
    assert token_dtype(n_tokens) == np.dtype(f"uint{bits}")
