"""A run's tokenizer as transformers reads it cuts text as the run does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from common.tokenizer import ByteTokenizer, FileTokenizer
from node.export.tokenizer_files import byte_tokenizer, tokenizer_files
from tests.support.tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

BYTES = Tokenizer.from_buffer(byte_tokenizer())


def written(folder: Path, run_file: bytes | None) -> Any:
    for name, data in tokenizer_files(run_file, context=64).items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


@given(st.text())
def test_of_bytes_the_ids_are_the_values_and_every_text_comes_back(text: str) -> None:
    ids = BYTES.encode(text).ids
    assert ids == ByteTokenizer().encode([text.encode()])[0].tolist()
    assert BYTES.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_not_utf8_become_replacement_characters(ids: list[int]) -> None:
    assert BYTES.decode(ids, skip_special_tokens=False) == bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["", "A", "  two  \n\n spaces ", "Ā stands for a byte", "żółw 🐢", "a\x00b"])
def test_transformers_reads_bytes_alike(tmp_path: Path, text: str) -> None:
    tokenizer = written(tmp_path, None)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([65, 255, 66]) == "A�B"


def test_a_batch_of_texts_in_bytes_is_filled_up_in_front_and_masked(tmp_path: Path) -> None:
    batch = written(tmp_path, None)(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[0, 0, 97], [97, 98, 99]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_the_runs_own_file_is_passed_on_as_it_is(tmp_path: Path) -> None:
    assert tokenizer_files(tiny_tokenizer(), context=64)["tokenizer.json"] == tiny_tokenizer()
    text = "the swarm trains żółw\n\n"
    ours = FileTokenizer(tiny_tokenizer(), "here").encode([text.encode()])[0].tolist()
    tokenizer = written(tmp_path, tiny_tokenizer())
    assert tokenizer(text)["input_ids"] == ours
    assert tokenizer.decode(ours) == text
    assert tokenizer.model_max_length == 64


def test_what_a_file_adds_around_text_which_no_run_trains_on_is_left_out(tmp_path: Path) -> None:
    library = Tokenizer.from_buffer(tiny_tokenizer())
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    library.enable_truncation(3)
    library.enable_padding(length=8)
    data = library.to_str().encode()
    text = "the swarm trains many tiny experts"
    ours = FileTokenizer(data, "here").encode([text.encode()])[0].tolist()
    assert written(tmp_path, data)(text)["input_ids"] == ours
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (table["truncation"], table["padding"], table["post_processor"]) == (None, None, None)
