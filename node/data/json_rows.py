"""Documents of JSON-lines and JSON files.

Before the path of a step. Nothing here trusts a file to be valid JSON, or its lines to fit in memory; what cannot be
read is a DataError that names the file, and the line or entry.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Final

from common.errors import DataError
from node.data.compressed import opened
from node.data.documents import Document, topic_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedIOBase
    from pathlib import Path

    from node.data.bad_rows import BadRows

MAX_JSON_LINE_BYTES: Final = 64 * 1024 * 1024
MAX_JSON_BYTES: Final = 256 * 1024 * 1024

TEXT_FIELDS: Final = ("text", "extract", "content")
EXPECTED: Final = f"a document is a string, or an object with a string field named {' or '.join(TEXT_FIELDS)}."


def json_lines(path: Path, bad_rows: BadRows) -> Iterator[Document]:
    """One document of each line of the file at `path`."""
    with opened(path) as file:
        lines = iter(partial(file.readline, MAX_JSON_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_JSON_LINE_BYTES:
                bad_rows.skip(DataError(f"{where}: longer than {MAX_JSON_LINE_BYTES} bytes; split the document."))
                _read_to_line_end(line, file)
            elif line.strip():
                try:
                    document = _document(_parse_json(line, where), where)
                except DataError as error:
                    bad_rows.skip(error)
                else:
                    yield document


def whole_json(path: Path) -> bytes | None:
    """The bytes of a JSON file, cut soon after MAX_JSON_BYTES; None if it holds JSON lines."""
    with opened(path) as file:
        if _holds_json_lines(file):
            return None
    with opened(path) as file:
        return file.read(MAX_JSON_BYTES + 1)


def records_of(path: Path, data: bytes) -> list[tuple[object, object]]:
    """Names and values of the records in `data`, the bytes of the JSON file at `path`: one, a list or a mapping.

    Raises DataError if none of them has text, so that a caller can still turn to reading the file as plain text.
    """
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{path}: longer than {MAX_JSON_BYTES} bytes; write it as JSON lines, one object per line.")
    records = list(_records(_parse_json(data, str(path))))
    if not records:
        raise DataError(f"{path}: holds no records; {EXPECTED}")
    if not any(_text_field(record) is not None for _, record in records):
        raise _without_text(f"{path}, entry {records[0][0]}")
    return records


def record_documents(path: Path, records: list[tuple[object, object]], bad_rows: BadRows) -> Iterator[Document]:
    """The documents of `records_of`."""
    for name, record in records:
        try:
            document = _document(record, f"{path}, entry {name}")
        except DataError as error:
            bad_rows.skip(error)
        else:
            yield document


def holds_documents(path: Path) -> bool:
    """Is the JSON file at `path` part of a corpus, and not settings or the like?"""
    data = whole_json(path)
    if data is None:
        return True
    try:
        records_of(path, data)
    except DataError:
        return False
    return True


def _holds_json_lines(file: BufferedIOBase) -> bool:
    """Does a `.json` file hold one object per line? Then its first line is a whole object, and there are more."""
    first, second = file.readline(MAX_JSON_LINE_BYTES), file.readline(1)
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_to_line_end(line: bytes, file: BufferedIOBase) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_JSON_LINE_BYTES)


def _records(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, list):
        return iter(enumerate(value))
    if not isinstance(value, dict):
        return iter(())
    if any(isinstance(value.get(field), str) for field in TEXT_FIELDS):
        return iter([(0, value)])
    return ((name, record) for name, record in value.items() if isinstance(record, dict) or record is None)


def _document(record: object, where: str) -> Document:
    text = _text_field(record)
    if text is None:
        raise _without_text(where)
    # JSON can spell half of a surrogate pair; UTF-8 cannot.
    return Document(text.encode("utf-8", errors="replace"), topic_of(record))


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
