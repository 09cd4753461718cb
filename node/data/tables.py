"""Documents of tables: the text column of Parquet and Arrow files, row by row.

Before the path of a step. A Parquet file is decoded page by page. An Arrow file is mapped into memory, so that of a
batch of rows only what is looked at is read; a compressed batch is unpacked as a whole, but for its other columns.
Nothing here trusts a file to be what its name says, nor offsets within it; what cannot be read is a DataError that
names the file. Imported when the first table is read: who reads none does not wait for pyarrow.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pyarrow as pa
from pyarrow import ipc, parquet, types

from common.errors import DataError
from common.text import peer_words
from node.data.formats import PARQUET
from node.data.json_rows import MAX_JSON_LINE_BYTES, TEXT_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.data.bad_rows import BadRows
    from node.data.formats import Format

MAX_ROW_BYTES: Final = MAX_JSON_LINE_BYTES
ROWS_AT_ONCE: Final = 64  # of a Parquet file; each may be a whole book
READ_AHEAD_BYTES: Final = 1024 * 1024
MAX_COLUMNS_TOLD: Final = 20
IPC_FILE_BEGINNING: Final = b"ARROW1"
IPC_STREAM_END: Final = b"\xff\xff\xff\xff\0\0\0\0"


def table_documents(path: Path, form: Format, bad_rows: BadRows) -> Iterator[bytes]:
    """The text of each row of a table that is `form`. Rows are counted from 0, as tables' own tools do.

    Raises OSError, and DataError for a table that is damaged or has no text column.
    """
    with _naming_damage(path, form):
        for number, text in enumerate(_parquet_rows(path) if form is PARQUET else _arrow_rows(path)):
            try:
                document = _document(text, f"{path}, row {number}")
            except DataError as error:
                bad_rows.skip(error)
            else:
                yield document


def _document(text: pa.Buffer | None, where: str) -> bytes:
    if text is None:
        raise DataError(f"{where}: has no text, but null.")
    if len(text) > MAX_ROW_BYTES:
        raise DataError(f"{where}: longer than {MAX_ROW_BYTES} bytes; split the document.")
    document = bytes(text)
    try:
        document.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert it to UTF-8.") from None
    return document


def _parquet_rows(path: Path) -> Iterator[pa.Buffer | None]:
    # Without read-ahead of whole columns, and with a buffer, a group of rows may be larger than memory.
    bounded = {"pre_buffer": False, "buffer_size": READ_AHEAD_BYTES, "page_checksum_verification": True}
    with pa.OSFile(os.fsencode(path)) as source, parquet.ParquetFile(source, **bounded) as file:
        name = file.schema_arrow.field(_text_column(path, file.schema_arrow)).name
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name], use_threads=False):
            yield from _texts(batch.column(_text_column(path, batch.schema)))


def _arrow_rows(path: Path) -> Iterator[pa.Buffer | None]:
    with pa.memory_map(os.fsencode(path)) as source:
        is_file = source.read(len(IPC_FILE_BEGINNING)) == IPC_FILE_BEGINNING
        batches = _file_batches if is_file else _stream_batches
        for batch in batches(path, source):
            yield from _texts(_checked(batch.column(0)))


def _file_batches(path: Path, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    with ipc.open_file(source) as reader:
        column = _text_column(path, reader.schema)
    with ipc.open_file(source, options=_only(column)) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _stream_batches(path: Path, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    source.seek(0)
    with ipc.open_stream(source) as reader:
        column = _text_column(path, reader.schema)
    source.seek(0)
    with ipc.open_stream(source, options=_only(column)) as reader:
        yield from reader
    # The reader takes the end of the file for the end of the stream; a file that was cut between batches has no mark.
    source.seek(max(0, source.tell() - len(IPC_STREAM_END)))
    if source.read(len(IPC_STREAM_END)) != IPC_STREAM_END:
        raise EOFError("it lacks the mark that ends a stream")


def _only(column: int) -> ipc.IpcReadOptions:
    return ipc.IpcReadOptions(included_fields=[column], use_threads=False)


def _text_column(path: Path, schema: pa.Schema) -> int:
    """The number of the first column of strings with a name of TEXT_FIELDS, the first of these names first."""
    columns = [(number, field) for number, field in enumerate(schema) if _is_string(field.type)]
    for name in TEXT_FIELDS:
        for number, field in columns:
            if field.name == name:
                return number
    told = [f"{peer_words(field.name)} ({peer_words(str(field.type))})" for field in list(schema)[:MAX_COLUMNS_TOLD]]
    more = f" and {len(schema) - len(told):,} more" if len(schema) > len(told) else ""
    raise DataError(
        f"{path} has no column of strings named {' or '.join(TEXT_FIELDS)}; its columns are "
        f"{', '.join(told) or 'none'}{more}: rename the one with the text."
    )


def _is_string(kind: pa.DataType) -> bool:
    value = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(value) or types.is_large_string(value) or types.is_string_view(value))


def _checked(column: pa.Array) -> pa.Array:
    """The strings of a batch as it lies in the file, as bytes: no offset leads out of it. Raises ArrowInvalid."""
    column.validate()
    if isinstance(column, pa.DictionaryArray):
        return pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    # As bytes, since one string that is not UTF-8 is a bad row, and no reason to refuse the table.
    texts = column.view(binary.get(column.type, pa.binary_view()))
    texts.validate(full=True)
    return texts


def _texts(column: pa.Array) -> Iterator[pa.Buffer | None]:
    for scalar in column:
        value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        yield None if value is None else value.as_buffer()


@contextmanager
def _naming_damage(path: Path, form: Format) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        reason = peer_words(" ".join(str(error).split()))
        raise DataError(
            f"{path} cannot be read as {form.kind} ({reason}): it is damaged or was cut short; fetch or write it again."
        ) from None
