"""What held-out windows are about: the topics of the documents that they are cut from.

Beside the path of a step. The cache keeps no documents, so the corpus is read once more, a lot of documents at a time;
what is kept grows with the windows that are asked for, and not with the text.
"""

# Shapes: N windows, M documents of a lot.

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from node.data.cache import BATCH_BYTES, HASH_BITS, SEPARATOR, held_out_hash
from node.data.dataset import HELD_OUT_FRACTION
from node.data.documents import Document
from node.data.progress import reading_shown
from node.data.sources import labelled_documents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from node.data.dataset import TextDataset

    Ints = NDArray[np.int64]

logger = logging.getLogger(__name__)

MAX_TOPICS: Final = 64
"""Topics that are told apart; the windows of all others have one topic together."""

OTHERS: Final = "others"


@dataclass(frozen=True, kw_only=True)
class WindowTopics:
    """The names of topics, and the index [N] among them of each window's: that of the document with most of it."""

    names: tuple[str, ...]
    of_window_N: Ints


def window_topics(dataset: TextDataset, starts_N: Ints, n_tokens: int, seed: int) -> WindowTopics | None:
    """Topics of held-out windows of `n_tokens` tokens, which begin at `starts_N`, in ascending order.

    `seed` is the one by which the text is held out. None, with a line in the log, where the documents that are read
    now are not those of the cache. Raises DataError for a corpus that cannot be read.
    """
    finder = _Finder(starts_N, n_tokens)
    for document, n_of_document in _held_out_documents(dataset, seed):
        finder.add(document.topic, n_of_document)
    if finder.n_tokens != dataset.index.held_out_tokens:
        logger.warning("Topics are left out: %s is too short, or has changed since it was read", dataset.corpus.title)
        return None
    return _most_frequent(finder.topics)


class _Finder:
    """Takes documents in their order, and keeps for each window the topic of the one that has most of it."""

    def __init__(self, starts_N: Ints, n_tokens: int) -> None:
        self.n_tokens = 0
        self.topics = [""] * len(starts_N)
        self._starts_N, self._ends_N = starts_N, starts_N + n_tokens
        self._most_N = np.zeros(len(starts_N), dtype=np.int64)

    def add(self, topic: str, n_tokens: int) -> None:
        """Lay the next document down behind the last."""
        start, self.n_tokens = self.n_tokens, self.n_tokens + n_tokens
        first = int(np.searchsorted(self._ends_N, start, side="right"))
        for index in range(first, int(np.searchsorted(self._starts_N, self.n_tokens))):
            shared = min(self._ends_N[index], self.n_tokens) - max(self._starts_N[index], start)
            if shared > self._most_N[index]:
                self._most_N[index], self.topics[index] = shared, topic


def _held_out_documents(dataset: TextDataset, seed: int) -> Iterator[tuple[Document, int]]:
    """The held-out documents in the order in which they lie in the cache, and their tokens."""
    limit = int(HELD_OUT_FRACTION * 2**HASH_BITS)
    lot, n_bytes, n_read = list[Document](), 0, 0
    with reading_shown(dataset.corpus) as tell:
        for document in labelled_documents(dataset.corpus):
            n_read += len(document.text)
            if held_out_hash(document.text, seed) >= limit:
                continue
            lot.append(document)
            n_bytes += len(document.text)
            if n_bytes >= BATCH_BYTES:
                tell(n_read)
                yield from _with_tokens(dataset, lot)
                lot, n_bytes = [], 0
        yield from _with_tokens(dataset, lot)


def _with_tokens(dataset: TextDataset, lot: Sequence[Document]) -> Iterator[tuple[Document, int]]:
    tokens = dataset.tokenizer.encode([document.text + SEPARATOR for document in lot])
    return zip(lot, map(len, tokens), strict=True)


def _most_frequent(topics: Sequence[str]) -> WindowTopics:
    """The topics by name, those beyond the most frequent MAX_TOPICS as one."""
    counts = Counter(topics)
    kept = {topic for topic, _ in counts.most_common(MAX_TOPICS if len(counts) <= MAX_TOPICS else MAX_TOPICS - 1)}
    told = [topic if topic in kept else OTHERS for topic in topics]
    names = tuple(sorted(set(told)))
    numbers = {name: number for number, name in enumerate(names)}
    return WindowTopics(names=names, of_window_N=np.array([numbers[topic] for topic in told], dtype=np.int64))
