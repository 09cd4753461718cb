"""The text column of Parquet and Arrow files is read row by row; what lies beside tables is no text of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from common.errors import DataError
from node.data import open_dataset, tables
from node.data.bad_rows import BadRows
from node.data.sources import find_corpus, read_documents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def write_stream(table: pa.Table, path: Path, rows: int = 10, compression: str | None = None) -> None:
    options = ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as target, ipc.new_stream(target, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as target, ipc.new_file(target, table.schema) as writer:
        writer.write_table(table, max_chunksize=len(table) or None)


WRITERS: dict[str, tuple[str, Callable[[pa.Table, Path], None]]] = {
    "Parquet": (".parquet", lambda table, path: parquet.write_table(table, path, row_group_size=7)),
    "Parquet of one group, with the other suffix": (".pq", parquet.write_table),
    "Parquet without Arrow's schema": (".PARQUET", lambda t, path: parquet.write_table(t, path, store_schema=False)),
    "Arrow stream": (".arrow", write_stream),
    "compressed Arrow stream": (".arrow", lambda table, path: write_stream(table, path, compression="zstd")),
    "Arrow file": (".arrow", write_file),
    "Feather version 2": (".feather", feather.write_feather),
}
KINDS = sorted(WRITERS)
STRINGS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int16(), pa.string()),
}


def write_table(folder: Path, kind: str, columns: dict[str, Any], name: str = "t") -> Path:
    suffix, write = WRITERS[kind]
    path = folder / (name + suffix)
    write(pa.table(columns), path)
    return path


def documents_of(path: Path) -> list[bytes]:
    return list(read_documents(find_corpus(path)))


def what_is_wrong_with(path: Path) -> str:
    try:
        documents_of(path)
    except DataError as error:
        return str(error)
    return ""


def write_json_lines(path: Path, texts: Sequence[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.none() | st.text(max_size=30), max_size=40), strings=st.sampled_from(sorted(STRINGS)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_the_documents_of_its_rows_as_json_lines(
    kind: str, texts: list[str | None], strings: str
) -> None:
    if "Arrow" not in kind and strings == "string_view":
        strings = "string"  # which Parquet and Feather do not tell apart
    numbers = list(range(len(texts)))
    column = pa.array(texts, pa.string()).cast(STRINGS[strings])
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder), kind, {"number": numbers, "text": column, "content": numbers})
        bad_rows, bad_lines = BadRows(), BadRows()
        lines = find_corpus(write_json_lines(Path(folder, "t.jsonl"), texts))
        assert list(read_documents(find_corpus(table), bad_rows)) == list(read_documents(lines, bad_lines))
        assert bad_rows.skipped == bad_lines.skipped


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_field_that_is_a_column_of_strings_is_the_text(tmp_path: Path, kind: str) -> None:
    columns = {"content": ["c", "d"], "text": [1, 2], "extract": ["e", "f"], "title": ["t", "u"]}
    assert documents_of(write_table(tmp_path, kind, columns)) == [b"e", b"f"]
    columns |= {"text": ["one", "two"]}
    assert documents_of(write_table(tmp_path, kind, columns)) == [b"one", b"two"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_a_text_column_names_the_columns_that_it_has(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind, {"id": [1], "text": [[1.5]], "bo\ndy": ["no"]})
    with pytest.raises(DataError, match=r"no column of strings named text or extract or content") as raised:
        documents_of(path)
    assert "its columns are id (int64), text (list<" in str(raised.value)
    assert "bo?dy (string): rename the one with the text." in str(raised.value)
    path = write_table(tmp_path, kind, {f"column {number}": [0] for number in range(100)})
    with pytest.raises(DataError, match=r"column 19 \(int64\) and 80 more: rename"):
        documents_of(path)


@pytest.mark.parametrize("kind", KINDS)
def test_null_rows_are_skipped_and_counted_or_refused(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind, {"text": ["one", None, "two", *[None] * 70, "three"]})
    bad_rows = BadRows()
    assert list(read_documents(find_corpus(path), bad_rows)) == [b"one", b"two", b"three"]
    assert (bad_rows.skipped, bad_rows.first_skipped) == (71, f"{path}, row 1: has no text, but null.")
    with pytest.raises(DataError, match="row 1: has no text"):
        open_dataset(path, cache_dir=tmp_path / "cache", strict=True)


def test_a_null_of_a_dictionary_is_one_too(tmp_path: Path) -> None:
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int8()), pa.array(["one", None, "two"]))
    bad_rows = BadRows()
    path = write_table(tmp_path, "Arrow file", {"text": dictionary})
    assert list(read_documents(find_corpus(path), bad_rows)) == [b"one", b"two"]
    assert bad_rows.skipped == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_utf8_or_too_long_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    texts = pa.array([b"one", b"caf\xe9", "é".encode() * 501, b"two"], pa.binary()).view(pa.string())
    bad_rows = BadRows()
    path = write_table(tmp_path, kind, {"text": texts})
    assert list(read_documents(find_corpus(path), bad_rows)) == [b"one", b"two"]
    assert (bad_rows.skipped, bad_rows.first_skipped) == (
        2,
        f"{path}, row 1: not UTF-8 at byte 3; convert it to UTF-8.",
    )


def test_only_some_rows_of_a_parquet_file_are_in_memory_however_large_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    texts = [os.urandom(10_000).hex() for _ in range(1000)]
    one_group = {"use_dictionary": False, "write_batch_size": 10}
    parquet.write_table(pa.table({"text": texts, "other": texts}), path, **one_group)
    default = pa.default_memory_pool()
    watched = pa.proxy_memory_pool(default)
    pa.set_memory_pool(watched)
    try:
        n_bytes = sum(map(len, documents_of(path)))
    finally:
        pa.set_memory_pool(default)
    assert n_bytes == 1000 * 20_000
    assert 0 < watched.max_memory() < n_bytes / 3


def test_text_that_is_no_table_is_read_without_pyarrow(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", ["one", "two"])
    code = (
        "import sys, pathlib; from node.data import open_dataset; "
        "open_dataset(pathlib.Path(sys.argv[1]), cache_dir=pathlib.Path(sys.argv[2])); "
        "sys.exit('pyarrow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code, path, tmp_path / "cache"], env=environment, check=False).returncode
        == 0
    )


# What is damaged


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_was_cut_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind, {"text": [f"Document {number}." for number in range(40)], "n": list(range(40))})
    whole = path.read_bytes()
    for size in {1, 7, 8, 9, *range(20, len(whole), 53), len(whole) - 9, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(
            DataError, match=rf"{path.name} cannot be read as \w+ \(.+\): it is damaged or was cut short"
        ):
            documents_of(path)


@settings(max_examples=100, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=4),
    strings=st.sampled_from(sorted(STRINGS)),
)
@pytest.mark.parametrize("kind", ["Parquet", "Arrow stream", "compressed Arrow stream", "Arrow file"])
def test_damage_anywhere_is_one_error_or_other_rows(kind: str, changes: list[tuple[int, int]], strings: str) -> None:
    texts = pa.array([None if n % 7 == 0 else f"Document {n}." for n in range(30)], pa.string())
    if kind == "Parquet" and strings == "string_view":
        strings = "string"
    with tempfile.TemporaryDirectory() as folder:
        path = write_table(Path(folder), kind, {"text": texts.cast(STRINGS[strings])})
        data = bytearray(path.read_bytes())
        for place, byte in changes:
            data[place % len(data)] = byte
        path.write_bytes(data)
        said = what_is_wrong_with(path)
        assert not said or said.startswith(f"{path} ")


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_what_is_not_what_its_name_says_is_named_alone_and_in_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("This is a text.\n" * 100, encoding="utf-8")
    write_json_lines(tmp_path / "rows.jsonl", ["one", "two"])
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"{name} cannot be read as (Parquet|Arrow) \("):
            open_dataset(path, cache_dir=tmp_path / "cache")


def test_a_table_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    path = write_table(tmp_path, "Parquet", {"text": ["one"]})
    corpus = find_corpus(path)
    path.unlink()
    with pytest.raises(DataError, match=r"t\.parquet does not exist"):
        list(read_documents(corpus))


@pytest.mark.parametrize(
    ("name", "beginning", "why"),
    [
        ("t.feather", b"FEA1", "Feather version 1: write it as version 2 or Parquet"),
        ("t.parquet", b"PARE", "encrypted Parquet: decrypt it"),
        (
            "t.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer: fetch the file with git lfs",
        ),
        ("t.bin", b"PAR1", "Parquet by another name: let it end in .parquet"),
        ("t.bin", b"ARROW1", "Arrow by another name: let it end in .arrow"),
        ("t.jsonl", b"\xff\xff\xff\xff", "Arrow by another name: let it end in .arrow"),
    ],
)
def test_what_is_no_table_that_can_be_read_is_left_out_with_a_remedy(
    tmp_path: Path, name: str, beginning: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(beginning + b"\1" * 100)
    write_json_lines(tmp_path / "rows.jsonl", ["one"])
    (left_out,) = find_corpus(tmp_path).left_out
    assert str(left_out).startswith(f"{name} ({why}")
    with pytest.raises(DataError, match=rf"{name} is not text"):
        find_corpus(tmp_path / name)


# Folders


def test_in_a_folder_with_tables_the_text_beside_them_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    write_table(root / "data", "Parquet", {"text": ["three", "four"]}, "train")
    write_table(root, "Arrow stream", {"content": ["five"]}, "z")
    write_json_lines(root / "a.jsonl", ["one"])
    (root / "b.json").write_text('{"x": {"text": "two"}}', encoding="utf-8")
    (root / "dataset_infos.json").write_text('{"default": {"description": "Sayings."}}', encoding="utf-8")
    (root / "broken.json").write_text("{", encoding="utf-8")
    (root / "README.md").write_text("# A data set", encoding="utf-8")
    (root / "LICENSE").write_text("Take it.", encoding="utf-8")
    (root / "load.py").write_text("print()", encoding="utf-8")
    dataset = open_dataset(root, cache_dir=tmp_path / "cache")
    assert sorted((bytes(dataset.train) + bytes(dataset.held_out)).split()) == [
        b"five",
        b"four",
        b"one",
        b"three",
        b"two",
    ]
    assert dataset.describe().endswith("; 5 files left out")
    (line,) = caplog.messages
    assert line.startswith(f"left out 5 of 9 files of {root}: ")
    assert "broken.json, dataset_infos.json (JSON without documents, beside tables)" in line
    assert "LICENSE, README.md, load.py (text beside tables: move it to a folder of its own to read it)" in line
    assert documents_of(root) == [b"one", b"two", b"three", b"four", b"five"]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.PQ", "t.feather", "t.parquet.gz"])
def test_a_card_is_no_corpus_where_its_table_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("# A data set", encoding="utf-8")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"holds no text to read \(looked at 2 files.*git lfs pull\).*README\.md \(text be"
    ):
        find_corpus(tmp_path)


def test_a_folder_of_code_and_text_is_read_as_before_when_it_has_no_table(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("one", encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"two": 2}', encoding="utf-8")
    (tmp_path / "parquet").write_text("three", encoding="utf-8")
    assert documents_of(tmp_path) == [b"one", b'{"two": 2}', b"three"]


# Folders that Hugging Face `datasets` saves


def save_to_disk(folder: Path, shards: Sequence[Sequence[str]], split: str) -> None:
    """The files that Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"text": list(texts), "label": list(range(len(texts)))})
        features = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}
        write_stream(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / name, rows=1000)
    info = {
        "citation": "",
        "description": "Reviews with a text and its label.",
        "features": {"text": {"dtype": "string", "_type": "Value"}, "label": {"dtype": "int64", "_type": "Value"}},
        "homepage": "",
        "license": "",
        "splits": {split: {"name": split, "num_bytes": 1000, "num_examples": 2, "dataset_name": "reviews"}},
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "8a3ae4a1a5a3c1f3",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")


def test_a_saved_dataset_is_its_shards_in_order_without_what_is_said_of_them(tmp_path: Path) -> None:
    root = tmp_path / "reviews"
    save_to_disk(root, [["one", "two"], ["three"]], "train")
    write_stream(pa.table({"text": ["ONE", "TWO"]}), root / "cache-1c80317fa3b1799d.arrow")
    write_stream(pa.table({"text": ["THREE"]}), root / "cache-1c80317fa3b1799d_00001_of_00002.arrow")
    corpus = find_corpus(root)
    assert list(read_documents(corpus)) == [b"one", b"two", b"three"]
    assert [str(file) for file in corpus.left_out] == [
        "cache-1c80317fa3b1799d.arrow (a cache file of datasets: rename it to read it)",
        "cache-1c80317fa3b1799d_00001_of_00002.arrow (a cache file of datasets: rename it to read it)",
        "dataset_info.json (JSON without documents, beside tables)",
        "state.json (JSON without documents, beside tables)",
    ]


def test_of_a_saved_dict_of_datasets_all_splits_are_read_in_sorted_order(tmp_path: Path) -> None:
    root = tmp_path / "reviews"
    for split in ("validation", "train", "test"):
        save_to_disk(root / split, [[f"{split} one", f"{split} two"]], split)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}', encoding="utf-8")
    corpus = find_corpus(root)
    assert list(read_documents(corpus)) == [
        f"{split} {number}".encode() for split in ("test", "train", "validation") for number in ("one", "two")
    ]
    assert [file.name for file in corpus.left_out] == [
        "dataset_dict.json",
        *(
            f"{split}/{name}"
            for split in ("test", "train", "validation")
            for name in ("dataset_info.json", "state.json")
        ),
    ]


def test_a_dataset_that_was_not_saved_to_its_end_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "reviews"
    save_to_disk(root, [["one", "two"]], "train")
    (shard,) = root.glob("data-*.arrow")
    os.truncate(shard, shard.stat().st_size - 8)  # as a writer leaves it that is killed after a batch
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow cannot be read as Arrow \(it lacks the mark that"):
        open_dataset(root, cache_dir=tmp_path / "cache")
