"""Which files are not text, and what their owner can do about it.

Before the path of a step: asked for each file of a corpus before any of it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from common.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROBE_BYTES: Final = 8 * 1024
MAX_NAMES: Final = 5
"""The most files of one kind that a message names."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file that is no text: known by its name's ending or by its first bytes. `remedy` may be empty."""

    kind: str
    remedy: str = ""
    suffixes: tuple[str, ...] = ()
    beginnings: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.remedy}" if self.remedy else self.kind


EMPTY: Final = Format(kind="empty")
BINARY: Final = Format(kind="not text")
NO_FILE: Final = Format(kind="no regular file")
LINKED_FOLDER: Final = Format(kind="a link to a folder", remedy="give that folder with --data")

TABLE_REMEDY: Final = "convert it to .jsonl or .txt"
FORMATS: Final = (
    Format(kind="Parquet", remedy=TABLE_REMEDY, suffixes=(".parquet", ".pq"), beginnings=(b"PAR1", b"PARE")),
    Format(
        kind="Arrow",
        remedy=TABLE_REMEDY,
        suffixes=(".arrow", ".feather"),
        beginnings=(b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"),
    ),
    Format(
        kind="a document",
        remedy="save it as .txt",
        suffixes=(".pdf", ".doc", ".docx", ".odt", ".epub"),
        beginnings=(b"%PDF-",),
    ),
    Format(
        kind="compressed",
        remedy="unpack it",
        suffixes=(".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar"),
        beginnings=(b"\x1f\x8b", b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!"),
    ),
    Format(
        kind="a Git LFS pointer",
        remedy="fetch the file with git lfs pull",
        beginnings=(b"version https://git-lfs.github.com/spec/",),
    ),
    Format(kind="UTF-16", remedy="convert it to UTF-8", beginnings=(b"\xff\xfe", b"\xfe\xff")),
)


@dataclass(frozen=True, kw_only=True)
class LeftOutFile:
    """A file of a folder that is not read; its `name` is its path in the folder."""

    name: str
    format: Format

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.format})"


def format_of(path: Path) -> Format | None:
    """What kind of file it is, None for text. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(PROBE_BYTES)
    if not head:
        return EMPTY
    suffix = path.suffix.lower()
    known = [form for form in FORMATS if suffix in form.suffixes]
    known += [form for form in FORMATS if head.startswith(form.beginnings)]
    return known[0] if known else BINARY if b"\0" in head else None


def left_out_text(left_out: Sequence[LeftOutFile]) -> str:
    """The files by name, those of one kind together: "t.parquet (Parquet: convert it to .jsonl or .txt)"."""
    kinds = [EMPTY, BINARY, NO_FILE, LINKED_FOLDER, *FORMATS]
    ordered = sorted(left_out, key=lambda file: -kinds.index(file.format))
    groups = [(form, [file.name for file in group]) for form, group in groupby(ordered, lambda file: file.format)]
    return "; ".join(f"{_names(names)} ({form})" for form, names in groups)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES:,} more"
