"""Compressed text is read as the text that is in it, in bounded memory; what is damaged says so."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import struct
import tarfile
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from node.data import json_rows, open_dataset
from node.data.bad_rows import BadRows
from node.data.compressed import MAX_WINDOW_BYTES, opened
from node.data.sources import MAX_DOCUMENT_BYTES, find_corpus, read_documents

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
SUFFIXES = sorted(PACKERS)


def documents_of(path: Path) -> list[bytes]:
    return list(read_documents(find_corpus(path)))


def rows(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def unpacked(path: Path) -> bytes | str:
    """What is in the file, or what is said of its damage."""
    try:
        with opened(path) as file:
            return file.read()
    except DataError as error:
        return str(error)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), max_size=20),
    cut=st.integers(0, 500),
)
def test_compressed_rows_and_text_are_those_of_the_file_that_was_packed(texts: list[str], cut: int) -> None:
    as_text, as_rows = "\n\n".join(texts).encode(), rows(texts)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("a.txt", as_text), ("a", as_text), ("a.jsonl", as_rows)):
            path = Path(folder, name)
            path.write_bytes(data)
            expected = documents_of(path)
            for suffix, pack in PACKERS.items():
                packed = Path(folder, name + suffix)
                packed.write_bytes(pack(data[:cut]) + pack(data[cut:]))  # as parts that were packed one by one
                assert documents_of(packed) == expected


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".GZ"])
@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
def test_the_name_before_the_suffix_says_what_is_inside(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKERS[suffix.lower()](b'{"x": {"text": "one"}, "y": {"text": "two"}}'))
    assert documents_of(path) == [b"one", b"two"]
    path.write_bytes(PACKERS[suffix.lower()](rows(["three", "four"])))
    assert documents_of(path) == [b"three", b"four"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_files_of_a_folder_are_read_in_their_place(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / f"b.jsonl{suffix}").write_bytes(PACKERS[suffix](rows(["two", "three"])))
    (tmp_path / f"c.json{suffix}").write_bytes(PACKERS[suffix](b'{"settings": true}'))
    (tmp_path / "d.md").write_text("five", encoding="utf-8")
    assert documents_of(tmp_path) == [b"one", b"two", b"three", b'{"settings": true}', b"five"]


def test_frames_that_hold_no_data_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    skipped = struct.pack("<II", 0x184D2A50, 5_000) + b"\1" * 5_000
    path.write_bytes(skipped + zstd(b"one ") + zstd(b"") + skipped + zstd(b"document") + skipped)
    assert documents_of(path) == [b"one document"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_rows_of_a_compressed_file_are_counted_as_any(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](rows(["one", "two"]) + b"null\n" + rows(["three"])))
    bad_rows = BadRows()
    assert list(read_documents(find_corpus(path), bad_rows)) == [b"one", b"two", b"three"]
    assert bad_rows.skipped == 1
    assert bad_rows.first_skipped.startswith(f"{path}, line 3: has no text")
    with pytest.raises(DataError, match="line 3: has no text"):
        open_dataset(path, cache_dir=tmp_path / "cache", strict=True)


# Sizes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bomb_is_cut_into_documents_without_ever_being_unpacked_as_a_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.txt{suffix}"
    path.write_bytes(PACKERS[suffix](b"x" * MIB) * 200)
    assert path.stat().st_size < MIB
    corpus = find_corpus(path)
    tracemalloc.start()
    try:
        sizes = {len(document) for document in read_documents(corpus)}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sizes == {MAX_DOCUMENT_BYTES}
    assert peak < 40 * MIB


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_limits_of_json_hold_for_what_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(json_rows, "MAX_JSON_LINE_BYTES", 1000)
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 1000)
    lines, whole = tmp_path / f"a.jsonl{suffix}", tmp_path / f"a.json{suffix}"
    lines.write_bytes(PACKERS[suffix](rows(["short", "x" * 5000, "also short"])))
    whole.write_bytes(PACKERS[suffix](json.dumps(["x" * 5000]).encode()))
    assert max(lines.stat().st_size, whole.stat().st_size) < 200
    bad_rows = BadRows()
    assert list(read_documents(find_corpus(lines), bad_rows)) == [b"short", b"also short"]
    assert "line 2: longer than 1000 bytes" in bad_rows.first_skipped
    with pytest.raises(DataError, match=rf"a\.json{suffix}: longer than 1000 bytes"):
        documents_of(whole)


def with_window(window_log: int) -> bytes:
    settings = zstandard.ZstdCompressionParameters(window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # does not know the size beforehand
    return packer.compress(b"text") + packer.flush()


def test_a_frame_may_ask_for_a_window_as_large_as_zstd_itself_takes_and_no_larger(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    largest = MAX_WINDOW_BYTES.bit_length() - 1
    path.write_bytes(with_window(largest))
    assert documents_of(path) == [b"text"]
    path.write_bytes(with_window(largest + 1))
    with pytest.raises(DataError, match=r"a\.txt\.zst cannot be unpacked \(.*too much memory.*more than 128 MiB"):
        documents_of(path)


# What is damaged


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = PACKERS[suffix](rows([f"Document {i * i}." for i in range(10)]))
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix} cannot be unpacked \(.*\): it is damaged or was cut"):
            documents_of(path)


@settings(max_examples=200, deadline=None)
@given(suffix=st.sampled_from(SUFFIXES), place=st.integers(0, 10_000), byte=st.binary(min_size=1, max_size=1))
def test_damage_anywhere_is_refused_or_changes_nothing(suffix: str, place: int, byte: bytes) -> None:
    text = " ".join(str(i * i) for i in range(400)).encode()
    packed = bytearray(PACKERS[suffix](text))
    place %= len(packed)
    packed[place : place + 1] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.txt{suffix}")
        path.write_bytes(packed)
        found = unpacked(path)
        assert found == text or str(found).startswith(f"{path} cannot be unpacked")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.json.gz"])
@pytest.mark.parametrize("data", [b"no archive at all", b"\x1f\x8b" + b"\1" * 100, b"\x28\xb5\x2f\xfd" + b"\1" * 100])
def test_what_is_not_what_its_name_says_is_named_alone_and_in_a_folder(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"{name} cannot be unpacked"):
            open_dataset(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_follows_the_last_frame_is_not_overlooked(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](b"text") + b"more, not packed")
    with pytest.raises(DataError, match="cannot be unpacked"):
        documents_of(path)


# What is not text


def a_tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty.txt"))
    return target.getvalue()


NOT_TEXT = {
    "a.tar": (a_tar(), "compressed: unpack it"),
    "tar": (a_tar(), "not text"),
    "a.parquet": (b"PAR1" + b"\1" * 100, "a compressed table: unpack it"),
    "a.arrow": (b"\1" * 100, "a compressed table: unpack it"),
    "parquet": (b"PAR1" + b"\1" * 100, "Parquet by another name: let it end in .parquet"),
    "a.jsonl": (b"text, then\0\0zero bytes", "not text"),
    "a.txt": ("Windows wrote this.".encode("utf-16"), "UTF-16: convert it to UTF-8"),
    "a.pdf": (b"%PDF-1.7", "a document: save it as .txt"),
    "twice.gz": (gzip.compress(b"text"), "compressed: unpack it"),
    "twice.txt": (zstd(b"text"), "compressed: unpack it"),
    "none.txt": (b"", "empty"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", sorted(NOT_TEXT))
def test_what_is_no_text_inside_is_left_out_as_it_is_outside(tmp_path: Path, name: str, suffix: str) -> None:
    data, why = NOT_TEXT[name]
    (tmp_path / (name + suffix)).write_bytes(PACKERS[suffix](data))
    (tmp_path / "rows.jsonl").write_bytes(rows(["one"]))
    corpus = find_corpus(tmp_path)
    assert [str(file) for file in corpus.left_out] == [f"{name}{suffix} ({why})"]
    assert list(read_documents(corpus)) == [b"one"]


def test_what_is_no_text_inside_is_refused_if_it_is_given(tmp_path: Path) -> None:
    for name, problem in (("tar", "holds zero bytes"), ("a.parquet", r"\(a compressed table\): unpack it\.")):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(NOT_TEXT[name][0]))
        with pytest.raises(DataError, match=rf"{name}\.gz is not text .*{problem}"):
            find_corpus(path)


ARCHIVES = {
    "a.txt.bz2": bz2.compress(b"text"),
    "a.tgz": gzip.compress(a_tar()),
    "gzip": gzip.compress(b"text"),
    "a.zip": b"PK\3\4",
    "a.7z": b"7z\xbc\xaf",
    "a.txt.xz": b"\xfd7zXZ\0",
    "a.tar": a_tar(),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_other_archives_are_left_out_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ARCHIVES[name])
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    assert [str(file) for file in find_corpus(tmp_path).left_out] == [f"{name} (compressed: unpack it)"]


def test_a_pointer_of_git_lfs_is_none_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\(a Git LFS pointer\): fetch the file with git lfs pull\."):
        find_corpus(tmp_path / "a.jsonl.gz")
