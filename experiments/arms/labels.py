"""What held-out bytes are about: the topic of their article, and the class of the byte itself.

Shapes: X held-out bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.errors import DataError
from node.data.cache import SEPARATOR, held_out_hash
from node.data.dataset import HELD_OUT_FRACTION
from node.data.sources import labelled_documents

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node.data import TextDataset
    from node.data.documents import Document

BYTE_CLASSES = ("space", "digit", "capital", "vowel", "consonant", "punctuation", "beyond ASCII")


def byte_classes() -> NDArray[np.uint8]:
    """Index into BYTE_CLASSES of each of the 256 byte values."""
    return np.array([_byte_class(value) for value in range(256)], dtype=np.uint8)


def _byte_class(value: int) -> int:
    char = chr(value)
    tests = (
        char.isspace(),
        "0" <= char <= "9",
        "A" <= char <= "Z",
        char in "aeiou",
        "a" <= char <= "z",
        value < 128,  # noqa: PLR2004 - what is ASCII
    )
    return next((index for index, holds in enumerate(tests) if holds), len(BYTE_CLASSES) - 1)


class Topics:
    """Topics of a text's documents: of the default corpus as its package labels the articles."""

    def __init__(self, dataset: TextDataset, seed: int = 0) -> None:
        documents = list(labelled_documents(dataset.corpus))
        self.names = sorted({topic for _, topic in documents})
        limit = int(HELD_OUT_FRACTION * 2**64)
        is_held_out = [held_out_hash(document, seed) < limit for document, _ in documents]
        self.train_X = self._per_byte([d for d, held in zip(documents, is_held_out, strict=True) if not held])
        self.held_out_X = self._per_byte([d for d, held in zip(documents, is_held_out, strict=True) if held])
        if len(self.train_X) != len(dataset.train) or len(self.held_out_X) != len(dataset.held_out):
            raise DataError("the corpus has topics, but its bytes are not those of the cache: delete the cache")

    def _per_byte(self, documents: list[Document]) -> NDArray[np.uint8]:
        numbers = np.array([self.names.index(topic) for _, topic in documents], dtype=np.uint8)
        return np.repeat(numbers, [len(document) + len(SEPARATOR) for document, _ in documents])
