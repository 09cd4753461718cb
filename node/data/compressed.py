"""Compressed files of a corpus, unpacked piece by piece while they are read.

Before the path of a step. Nothing here trusts a file to be whole, or to unpack to a size that fits in memory: a reader
asks for as many bytes as it takes, and what is unpacked ahead of it is bounded.
"""

from __future__ import annotations

import gzip
import io
import zlib
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from zstandard import ZstdDecompressor, ZstdError

from common.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _typeshed import WriteableBuffer

GZIP_SUFFIX: Final = ".gz"
ZSTD_SUFFIX: Final = ".zst"
PACKED_SUFFIXES: Final = (GZIP_SUFFIX, ZSTD_SUFFIX)

# What `zstd` itself unpacks without being told to take more memory, and `zstd --ultra -22` or `--long` need.
MAX_WINDOW_BYTES: Final = 128 * 1024 * 1024
# A block of 128 KiB can be packed into four bytes, so this many unpack to 32 MiB at most.
PIECE_BYTES: Final = 1024


def unpacked_name(name: str) -> str:
    """The name of what is inside: `a.jsonl` of `a.jsonl.gz`; a name that is of no compressed file is its own."""
    suffix = next((suffix for suffix in PACKED_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked where its name ends in .gz or .zst. Raises OSError.

    A read that meets damage ends the `with` by a DataError that names the file.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if suffix not in PACKED_SUFFIXES:
            yield file
            return
        try:
            with _unpacking(file, suffix) as unpacked:
                yield unpacked
        except (gzip.BadGzipFile, zlib.error, ZstdError, EOFError) as error:
            window = f", or needs a window of more than {MAX_WINDOW_BYTES >> 20} MiB" if suffix == ZSTD_SUFFIX else ""
            raise DataError(
                f"{path} cannot be unpacked ({error}): it is damaged or was cut short{window}; fetch it again, or pack "
                "it anew."
            ) from None


def _unpacking(file: io.BufferedIOBase, suffix: str) -> io.BufferedIOBase:
    if suffix == GZIP_SUFFIX:
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Pieces(_zstd_pieces(file)))


def _zstd_pieces(file: io.BufferedIOBase) -> Iterator[bytes]:
    """What the frames of `file` hold, one after the other. Raises ZstdError, and EOFError if the last one is cut."""
    decompressor = ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = None
    for packed in iter(partial(file.read, PIECE_BYTES), b""):
        rest = packed
        while rest:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(rest)
            rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends within a frame")


class _Pieces(io.RawIOBase):
    """A file whose bytes an iterator gives piece by piece; pieces may be empty."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._piece))
        target[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        return size
