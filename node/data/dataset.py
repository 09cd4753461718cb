"""Batches of tokens: training windows in a shuffled order that any step can be read from, and fixed held-out windows.

Path of a step: **data** -> transformer -> gate -> dispatch. Everything is a function of its arguments, so a resumed
trainer reads on exactly where it stopped, and any number of threads may read at once.
"""

# Shapes: B sequences of a batch, T positions (context); a window is T + 1 tokens, the inputs and the targets one later.

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import ConfigError, DataError, InvalidInputError
from common.eviction import keep_below
from common.folders import data_cache_bytes
from common.tokenizer import ByteTokenizer
from node.data.cache import Reading, SplitConfig, cached_corpus
from node.data.eviction import stored_corpora
from node.data.progress import reading_shown
from node.data.shuffle import keys_of, shuffled
from node.data.sources import find_corpus, read_documents

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from common.tokenizer import Tokenizer, Tokens
    from node.data.cache import Index
    from node.data.sources import Corpus

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05


def open_dataset(
    path: Path | None,
    *,
    cache_dir: Path,
    held_out_fraction: float = HELD_OUT_FRACTION,
    seed: int = 0,
    strict: bool = False,
    tokenizer: Tokenizer | None = None,
) -> TextDataset:
    """The corpus at `path` (None: the default corpus), read into `cache_dir` on first use and mapped from there.

    `path` is a text file (cut into documents of about 2 KiB at blank lines), a JSON-lines, JSON, Parquet or Arrow file
    with a field or column named text, extract or content, or a folder of such files; all but tables may be compressed.
    About `held_out_fraction` of the documents, chosen by content and `seed`, are held out. Tokens are those of
    `tokenizer`, or bytes. Files and rows that cannot be read are left out and told; with `strict` such a row is
    refused. Raises DataError, or ConfigError for the fraction and the cache's bound.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ConfigError(f"held_out_fraction: is {held_out_fraction}, must lie between 0 and 1; 0.05 is usual.")
    max_bytes = data_cache_bytes()
    corpus = find_corpus(path, exclude=cache_dir)
    split = SplitConfig(fraction=held_out_fraction, seed=seed)
    with reading_shown(corpus) as tell:
        reading = Reading(
            documents=partial(read_documents, corpus), tokenizer=tokenizer or ByteTokenizer(), strict=strict, tell=tell
        )
        mapped = cached_corpus(cache_dir, corpus, split, reading)
    dataset = TextDataset(
        corpus=corpus, index=mapped.index, train=mapped.train, held_out=mapped.held_out, tokenizer=reading.tokenizer
    )
    for problem in dataset.problems():
        logger.warning("%s", problem)
    keep_below(max_bytes, cache_dir, stored_corpora)
    return dataset


@dataclass(frozen=True, kw_only=True)
class TextDataset:
    """Training and held-out tokens, mapped from disk. `index` counts documents, bytes and tokens of both."""

    corpus: Corpus
    index: Index
    train: Tokens
    held_out: Tokens
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)

    @property
    def train_bytes_per_token(self) -> float:
        """How many bytes of the training text a token stands for, on average; 1 where tokens are bytes."""
        return self.index.train_bytes / self.index.train_tokens

    @property
    def held_out_bytes_per_token(self) -> float:
        """How many bytes of the held-out text a token stands for, on average; 1 where tokens are bytes."""
        return self.index.held_out_bytes / self.index.held_out_tokens

    def describe(self) -> str:
        """One line for a person: title, documents and bytes of each part, files left out."""
        index, skipped = self.index, self.corpus.skipped_files
        return (
            f"{self.corpus.title}: {index.train_documents:,} documents, {index.train_bytes / 1e6:.1f} MB to train on; "
            f"{index.held_out_documents:,} documents, {index.held_out_bytes / 1e6:.2f} MB held out"
            + ("" if index.train_tokens == index.train_bytes else f"; {self.train_bytes_per_token:.2f} bytes a token")
            + (f"; {skipped:,} files left out" if skipped else "")
        )

    def problems(self) -> list[str]:
        """One line each for files that are not read, rows that are skipped, and text that is not UTF-8."""
        index, left_out = self.index, self.corpus.left_out_text()
        problems = [left_out] if left_out else []
        if index.skipped_rows:
            rows = "row" if index.skipped_rows == 1 else "rows"
            problems.append(
                f"skipped {index.skipped_rows:,} {rows} of {self.corpus.title} that cannot be read, the first: "
                f"{index.first_skipped_row}"
            )
        if index.not_utf8:
            problems.append(
                f"{self.corpus.title} has {index.not_utf8:,} pieces of text that are not UTF-8, read as the bytes that "
                f"they are, the first: {index.first_not_utf8}"
            )
        return problems

    def train_batch(self, step: int, *, shard: int, n_shards: int, batch: int, context: int, seed: int) -> torch.Tensor:
        """Batch number `step` of a shard: int64 [B, T + 1].

        The training tokens are cut into windows; window i belongs to shard i mod n_shards, so that shards never share a
        target token. In each epoch a shard meets each of its windows once, in an order of its own.
        """
        _check_positive(batch=batch, context=context, n_shards=n_shards)
        if step < 0 or not 0 <= shard < n_shards:
            raise InvalidInputError("shard, step", f"are {shard}, {step}; shard is in [0, {n_shards}), step 0 or more")
        n_windows = _n_windows(self.train, context)
        n_own = -(-(n_windows - shard) // n_shards)
        if n_own <= 0:
            raise DataError(
                f"{self.corpus.title}: {len(self.train)} training tokens give {n_windows} windows of {context + 1}, "
                f"too few for {n_shards} trainers: give more text, or a shorter context."
            )
        positions = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
        own = shuffled(positions % np.uint64(n_own), n_own, keys_of(seed, shard, positions // np.uint64(n_own)))
        return _windows(self.train, own.astype(np.int64) * n_shards + shard, context)

    def held_out_batches(self, batch: int, context: int, max_bytes: int | None = None) -> Iterator[torch.Tensor]:
        """Held-out windows, int64 [up to B, T + 1]: the same ones each time, their targets never overlapping.

        With `max_bytes` only as many as predict about that many bytes (at least one), spread evenly over the held-out
        text.
        """
        _check_positive(batch=batch, context=context)
        max_tokens = None if max_bytes is None else int(max_bytes / self.held_out_bytes_per_token)
        chosen = self.spread_held_out(context, max_tokens)
        starts = range(0, len(chosen), batch)
        return (_windows(self.held_out, chosen[start : start + batch], context) for start in starts)

    def spread_held_out(self, context: int, max_tokens: int | None = None) -> NDArray[np.int64]:
        """Return the numbers of the held-out windows that predict about `max_tokens`, spread evenly; None for all.

        There is at least one. Raises DataError where there is none.
        """
        _check_positive(context=context)
        n_windows = _n_windows(self.held_out, context)
        if not n_windows:
            raise DataError(
                f"{self.corpus.title}: {len(self.held_out)} held-out tokens are fewer than one window of "
                f"{context + 1}: give more text, or a larger held-out fraction."
            )
        n_wanted = n_windows if max_tokens is None else min(n_windows, max(1, max_tokens // context))
        return np.arange(n_wanted, dtype=np.int64) * n_windows // n_wanted

    def n_held_out(self, context: int) -> int:
        """How many held-out windows there are."""
        _check_positive(context=context)
        return _n_windows(self.held_out, context)

    def held_out_windows(self, numbers: NDArray[np.int64], context: int) -> torch.Tensor:
        """Return the held-out windows of these numbers, each below `n_held_out`: int64 [len(numbers), T + 1]."""
        return _windows(self.held_out, numbers, context)


def _n_windows(part: Tokens, context: int) -> int:
    return (len(part) - 1) // context


def _windows(part: Tokens, numbers: NDArray[np.int64], context: int) -> torch.Tensor:
    ids_BT = part[numbers[:, None] * context + np.arange(context + 1)]
    return torch.from_numpy(ids_BT.astype(np.int64))


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InvalidInputError(name, f"is {value}; it must be at least 1")
