"""A corpus laid down once as two files of tokens, training and held-out, that every later start maps into memory.

Before the path of a step. A corpus has one folder in the cache:

    NAME-HASH/train.bin  held_out.bin  index.json      index.json names the source's fingerprint and the files' sizes
    NAME-HASH.lock                                     held while building, so that two trainers do not build at once

It has one for each tokenizer. The folder appears by one rename, after an fsync: a reader sees a whole cache or none. A
crash leaves NAME-HASH.building, which the next build removes. Whoever maps a corpus holds a shared lock on its
train.bin, by which `eviction` knows what is in use; the time of index.json is that of its last use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

import numpy as np

from common.atomic_file import sync_folder
from common.errors import DataError
from common.folders import locked
from common.tokenizer import token_dtype
from node.data.bad_rows import BadRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from common.tokenizer import Tokenizer, Tokens
    from node.data.sources import Corpus

FORMAT: Final = 3
SEPARATOR: Final = b"\n\n"  # ends every document in the files
HASH_BITS: Final = 64
CONTENT_BYTES: Final = 16
BATCH_BYTES: Final = 1 << 20
"""Documents are given to the tokenizer in lots of about this size, which it spreads over the processor's cores."""

TRAIN_FILE, HELD_OUT_FILE, INDEX_FILE = "train.bin", "held_out.bin", "index.json"


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which documents are held out: those whose content, hashed with `seed`, falls in the lowest `fraction`."""

    fraction: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a cache folder holds, in documents, bytes of text and tokens; separators count.

    `fingerprint` tells whether its source is as it was, `content` is a hash of all documents. The rest is what was
    wrong in the source.
    """

    fingerprint: str
    content: str
    train_documents: int
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    skipped_rows: int = 0
    first_skipped_row: str = ""
    not_utf8: int = 0
    first_not_utf8: str = ""


class Documents(Protocol):
    """Reads the corpus from its beginning and tells what is wrong in it."""

    def __call__(self, bad_rows: BadRows, /) -> Iterable[bytes]:
        """Return the documents."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A corpus that can be read more than once, each time from its beginning, and how it is cut into tokens.

    With `strict` a bad row is an error. `tell` is called with the bytes that were read so far.
    """

    documents: Documents
    tokenizer: Tokenizer
    strict: bool = False
    tell: Callable[[int], None] = lambda _: None

    def read(self) -> tuple[Iterable[bytes], BadRows]:
        """The documents and, filled while they are read, what was wrong."""
        bad_rows = BadRows(strict=self.strict)
        return self.documents(bad_rows), bad_rows


@dataclass(frozen=True, kw_only=True)
class MappedCorpus:
    """A corpus of the cache, which is kept there for as long as its two parts are mapped."""

    index: Index
    train: Tokens
    held_out: Tokens


def cached_corpus(cache_dir: Path, corpus: Corpus, split: SplitConfig, reading: Reading) -> MappedCorpus:
    """`corpus` from the cache, built by `reading` unless it is there and as new as its source. Raises DataError."""
    dtype = token_dtype(reading.tokenizer.vocab_size)
    folder = cache_dir / _folder_name(corpus, split, reading.tokenizer)
    fingerprint = _fingerprint(corpus, split, reading.tokenizer)
    with _naming_write_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            index = _read_index(folder, fingerprint, dtype)
            if reading.strict and index is not None and (index.first_skipped_row or index.first_not_utf8):
                raise DataError(index.first_skipped_row or index.first_not_utf8)
            index = index or _build(folder, fingerprint, split, reading)
            with suppress(PermissionError):  # another user's: the time of its last use is not ours to set
                os.utime(folder / INDEX_FILE)
            train, held_out = _map(folder / TRAIN_FILE, dtype), _map(folder / HELD_OUT_FILE, dtype)
            return MappedCorpus(index=index, train=train, held_out=held_out)


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> Tokens:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # lasts as long as the mapping, which keeps the open file
        return np.memmap(file, dtype=dtype, mode="r")


def held_out_hash(document: bytes, seed: int) -> int:
    """Place of a document in [0, 2**64), from its content alone: other documents and their order do not matter."""
    digest = hashlib.blake2b(document, digest_size=HASH_BITS // 8, key=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def _folder_name(corpus: Corpus, split: SplitConfig, tokenizer: Tokenizer) -> str:
    name = re.sub(r"[^A-Za-z0-9]+", "-", corpus.title).strip("-").lower()[:40] or "corpus"
    return f"{name}-{_sha256([str(corpus.root.resolve()), asdict(split), tokenizer.name])[:12]}"


def _fingerprint(corpus: Corpus, split: SplitConfig, tokenizer: Tokenizer) -> str:
    return _sha256([FORMAT, asdict(split), corpus.file_stamps, tokenizer.name])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_index(folder: Path, fingerprint: str, dtype: np.dtype[np.unsignedinteger]) -> Index | None:
    """None when the cache is absent, of another source, or damaged: all are mended by building it."""
    try:
        index = Index(**json.loads((folder / INDEX_FILE).read_bytes()))
        sizes = tuple((folder / name).stat().st_size for name in (TRAIN_FILE, HELD_OUT_FILE))
    except (OSError, ValueError, TypeError):
        return None
    wanted = (index.train_tokens * dtype.itemsize, index.held_out_tokens * dtype.itemsize)
    return index if index.fingerprint == fingerprint and sizes == wanted else None


def _build(folder: Path, fingerprint: str, split: SplitConfig, reading: Reading) -> Index:
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        index = _write_parts(building, fingerprint, split, reading)
        with _synced(building / INDEX_FILE) as file:
            file.write(json.dumps(asdict(index)).encode())
        # A trainer that still maps the old files keeps them until it ends.
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return index


def _write_parts(building: Path, fingerprint: str, split: SplitConfig, reading: Reading) -> Index:
    parts = _Parts(building, split.seed, limit=int(split.fraction * 2**HASH_BITS))
    bad_rows = parts.write(reading)
    if parts.lowest >= parts.highest:
        if bad_rows.skipped:
            raise DataError(
                f"The corpus has fewer than two different documents that can be read; {bad_rows.skipped:,} cannot, the "
                f"first is {bad_rows.first_skipped}"
            )
        raise DataError(
            "The corpus has fewer than two different documents, so none can be held out: give more text, separate "
            "documents by blank lines, or give a folder of files."
        )
    if not parts.n_documents[HELD_OUT_FILE] or not parts.n_documents[TRAIN_FILE]:
        # So few documents that the fraction left one side empty: that side gets the one document nearest to it.
        limit = parts.highest if parts.n_documents[HELD_OUT_FILE] else parts.lowest + 1
        parts = _Parts(building, split.seed, limit=limit)
        parts.write(reading)
    if not parts.n_tokens[HELD_OUT_FILE] or not parts.n_tokens[TRAIN_FILE]:
        raise DataError("The tokenizer makes no tokens of this text; give more text, or another tokenizer.")
    return Index(
        fingerprint=fingerprint,
        train_documents=parts.n_documents[TRAIN_FILE],
        train_bytes=parts.n_bytes[TRAIN_FILE],
        train_tokens=parts.n_tokens[TRAIN_FILE],
        held_out_documents=parts.n_documents[HELD_OUT_FILE],
        held_out_bytes=parts.n_bytes[HELD_OUT_FILE],
        held_out_tokens=parts.n_tokens[HELD_OUT_FILE],
        content=parts.content(),
        skipped_rows=bad_rows.skipped,
        first_skipped_row=bad_rows.first_skipped,
        not_utf8=bad_rows.not_utf8,
        first_not_utf8=bad_rows.first_not_utf8,
    )


class _Parts:
    """Writes documents to one of two files: held out where their hash is below `limit`."""

    def __init__(self, folder: Path, seed: int, limit: int) -> None:
        self._folder, self._seed, self._limit = folder, seed, limit
        self.n_documents, self.n_bytes, self.n_tokens = Counter[str](), Counter[str](), Counter[str]()
        self.lowest, self.highest = 2**HASH_BITS, -1
        self._content = hashlib.blake2b(digest_size=CONTENT_BYTES)

    def content(self) -> str:
        """A hash of all documents that were written, in their order."""
        return self._content.hexdigest()

    def write(self, reading: Reading) -> BadRows:
        """Write every document; what was wrong in the corpus."""
        documents, bad_rows = reading.read()
        with ExitStack() as stack:
            files = {name: stack.enter_context(_synced(self._folder / name)) for name in (TRAIN_FILE, HELD_OUT_FILE)}
            for lot in _lots(documents):
                names = [self._count(document) for document in lot]
                tokens = reading.tokenizer.encode([document + SEPARATOR for document in lot])
                for name, tokens_L in zip(names, tokens, strict=True):
                    self.n_tokens[name] += len(tokens_L)
                    files[name].write(tokens_L.tobytes())
                reading.tell(self.n_bytes.total())
        return bad_rows

    def _count(self, document: bytes) -> str:
        """The file that `document` belongs in."""
        place = held_out_hash(document, self._seed)
        self.lowest, self.highest = min(self.lowest, place), max(self.highest, place)
        name = HELD_OUT_FILE if place < self._limit else TRAIN_FILE
        self.n_documents[name] += 1
        self.n_bytes[name] += len(document) + len(SEPARATOR)
        self._content.update(document + SEPARATOR)
        return name


def _lots(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    lot, n_bytes = list[bytes](), 0
    for document in documents:
        lot.append(document)
        n_bytes += len(document)
        if n_bytes >= BATCH_BYTES:
            yield lot
            lot, n_bytes = [], 0
    if lot:
        yield lot


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _naming_write_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The data cache in {cache_dir} cannot be written: {error.strerror or error}. Free space there, or set "
            "KILOHIVE_CACHE to a folder that you can write to."
        ) from None
