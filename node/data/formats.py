"""What kind of file each one of a corpus is: which are read, and what can be done about the others.

Before the path of a step: asked for each file of a corpus before any of it is read. A file is read as what its name
says, and left out where its first bytes say that it is something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from common.text import printable
from node.data.compressed import PACKED_SUFFIXES, opened, unpacked_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROBE_BYTES: Final = 8 * 1024
MAX_NAMES: Final = 5
"""The most files of one kind that a message names."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file, known by its name's ending or by its first bytes.

    `remedy` says what to do with a file that is left out for it, and may be empty.
    """

    kind: str
    remedy: str = ""
    suffixes: tuple[str, ...] = ()
    beginnings: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.remedy}" if self.remedy else self.kind

    def fits(self, name: str, head: bytes) -> bool:
        """Does a file of this name with these first bytes look like one?"""
        return name.lower().endswith(self.suffixes) or head.startswith(self.beginnings)


TEXT: Final = Format(kind="text")
JSON_LINES: Final = Format(kind="JSON lines", suffixes=(".jsonl", ".ndjson"))
JSON: Final = Format(kind="JSON", suffixes=(".json",))
PARQUET: Final = Format(kind="Parquet", suffixes=(".parquet", ".pq"))
ARROW: Final = Format(kind="Arrow", suffixes=(".arrow", ".feather"))
TABLES: Final = (PARQUET, ARROW)
READ: Final = (TEXT, JSON_LINES, JSON, *TABLES)

EMPTY: Final = Format(kind="empty")
BINARY: Final = Format(kind="not text")
NO_FILE: Final = Format(kind="no regular file")
LINKED_FOLDER: Final = Format(kind="a link to a folder", remedy="give that folder with --data")
TEXT_BESIDE_TABLES: Final = Format(kind="text beside tables", remedy="move it to a folder of its own to read it")
JSON_BESIDE_TABLES: Final = Format(kind="JSON without documents, beside tables")
CACHED_TABLE: Final = Format(kind="a cache file of datasets", remedy="rename it to read it")
PACKED_TABLE: Final = Format(kind="a compressed table", remedy="unpack it")

PACKED: Final = Format(kind="compressed", suffixes=PACKED_SUFFIXES)
ARCHIVE: Final = Format(
    kind="compressed",
    remedy="unpack it",
    suffixes=(".tgz", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".rar", ".tar"),
    beginnings=(b"\x1f\x8b", b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!"),
)

# The first that fits counts, so what says more stands first: a pointer of Git LFS has the name of what it points to.
FORMATS: Final = (
    Format(
        kind="a Git LFS pointer",
        remedy="fetch the file with git lfs pull",
        beginnings=(b"version https://git-lfs.github.com/spec/",),
    ),
    Format(
        kind="a document",
        remedy="save it as .txt",
        suffixes=(".pdf", ".doc", ".docx", ".odt", ".epub"),
        beginnings=(b"%PDF-",),
    ),
    Format(kind="encrypted Parquet", remedy="decrypt it", beginnings=(b"PARE",)),
    Format(kind="Feather version 1", remedy="write it as version 2 or Parquet", beginnings=(b"FEA1",)),
    *TABLES,
    Format(kind="Parquet by another name", remedy="let it end in .parquet", beginnings=(b"PAR1",)),
    Format(kind="Arrow by another name", remedy="let it end in .arrow", beginnings=(b"ARROW1", b"\xff\xff\xff\xff")),
    PACKED,
    ARCHIVE,
    Format(kind="UTF-16", remedy="convert it to UTF-8", beginnings=(b"\xff\xfe", b"\xfe\xff")),
)
ALL_FORMATS: Final = (
    *(EMPTY, BINARY, NO_FILE, LINKED_FOLDER, TEXT_BESIDE_TABLES, JSON_BESIDE_TABLES, CACHED_TABLE, PACKED_TABLE),
    *FORMATS,
)


@dataclass(frozen=True, kw_only=True)
class LeftOutFile:
    """A file of a folder that is not read; its `name` is its path in the folder."""

    name: str
    format: Format

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.format})"


def format_of(path: Path) -> Format:
    """What kind of file it is: one of READ, or why it is not read. Of a compressed file, what is in it.

    Raises OSError, and DataError for a compressed file that is damaged where it begins.
    """
    with path.open("rb") as file:
        form = _format(path.name, file.read(PROBE_BYTES))
    if form is not PACKED:
        return form
    with opened(path) as unpacked:
        inner = _format(unpacked_name(path.name), unpacked.read(PROBE_BYTES))
    if inner in TABLES:
        return PACKED_TABLE
    return ARCHIVE if inner is PACKED else inner


def _format(name: str, head: bytes) -> Format:
    if not head:
        return EMPTY
    known = next((form for form in FORMATS if form.fits(name, head)), None)
    if known is None and b"\0" in head:
        return BINARY
    return known or next((form for form in (JSON_LINES, JSON) if form.fits(name, head)), TEXT)


def names_table(path: Path) -> bool:
    """Is the file a table by its name, whatever it holds, compressed or not?"""
    return any(form.fits(unpacked_name(path.name), b"") for form in TABLES)


def left_out_text(left_out: Sequence[LeftOutFile]) -> str:
    """The files by name, those of one kind together: "a.pdf, b.pdf (a document: save it as .txt)"."""
    ordered = sorted(left_out, key=lambda file: -ALL_FORMATS.index(file.format))
    groups = [(form, [file.name for file in group]) for form, group in groupby(ordered, lambda file: file.format)]
    return "; ".join(f"{_names(names)} ({form})" for form, names in groups)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES:,} more"
