"""A text for each participant: the training text cut by topic, by clusters of like documents, or at random.

Shapes: N documents, F features, S shards.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from common.errors import DataError
from experiments.arms.labels import Topics
from node.data.cache import SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from node.data import TextDataset

    Ints = NDArray[np.int64]

Sharding = Literal["topic", "cluster", "random"]
SHARDINGS: tuple[Sharding, ...] = ("topic", "random", "cluster")

FEATURES = 4096
"""Most frequent words that documents are compared by."""
ROUNDS = 30


def texts_of(dataset: TextDataset, sharding: Sharding, n_shards: int, seed: int) -> list[TextDataset]:
    """The training text in `n_shards` parts; the held-out text of each is the whole one."""
    documents = split(dataset.train)
    shard_N = shards_of(dataset, documents, sharding, n_shards, seed)
    parts = [
        b"".join(document for document, shard in zip(documents, shard_N, strict=True) if shard == index)
        for index in range(n_shards)
    ]
    if not all(parts):
        raise DataError(f"{dataset.corpus.title}: too few documents for {n_shards} shards by {sharding}")
    return [replace(dataset, train=np.frombuffer(part, dtype=np.uint8)) for part in parts]


def split(text: NDArray[np.uint8]) -> list[bytes]:
    """Split a text into documents, or their paragraphs, at blank lines, which stay at the end of each part."""
    return [part + SEPARATOR for part in text.tobytes().removesuffix(SEPARATOR).split(SEPARATOR)]


def shards_of(dataset: TextDataset, documents: Sequence[bytes], sharding: Sharding, n_shards: int, seed: int) -> Ints:
    """Shard of each document."""
    sizes_N = np.array([len(document) for document in documents])
    rng = np.random.default_rng(seed)
    if sharding == "random":
        return rng.integers(n_shards, size=len(documents), dtype=np.int64)
    if sharding == "cluster":
        return clusters(tf_idf(documents), n_shards, rng)
    topic_N = Topics(dataset).train_X[sizes_N.cumsum() - sizes_N].astype(np.int64)
    shard_of: Ints = evenly(np.bincount(topic_N, weights=sizes_N).tolist(), n_shards)[topic_N]
    return shard_of


def evenly(sizes: Sequence[float], n_shards: int) -> Ints:
    """Shard of each thing, the largest first, each to the shard that has least."""
    shard_of, filled = np.zeros(len(sizes), dtype=np.int64), np.zeros(n_shards)
    for index in np.argsort(sizes, kind="stable")[::-1]:
        shard_of[index] = filled.argmin()
        filled[shard_of[index]] += sizes[index]
    return shard_of


def tf_idf(documents: Sequence[bytes]) -> sparse.csr_array:
    """Unit rows [N, F]: log counts of the frequent words, weighted by how few documents hold them."""
    counts = [Counter(re.findall(rb"[a-z\x80-\xff]+", document.lower())) for document in documents]
    held_by = Counter(word for count in counts for word in count)
    column = {word: index for index, (word, _) in enumerate(held_by.most_common(FEATURES))}
    cells = [
        (row, column[word], (1 + np.log(n)) * np.log(len(documents) / held_by[word]))
        for row, count in enumerate(counts)
        for word, n in count.items()
        if word in column
    ]
    rows, columns, values = (np.array(values) for values in zip(*cells, strict=True))
    table_NF = sparse.csr_array((values, (rows, columns)), shape=(len(documents), len(column)))
    norm_N = np.sqrt(table_NF.multiply(table_NF).sum(1))
    return sparse.csr_array(table_NF.multiply(1 / np.maximum(norm_N, 1e-12)[:, None]))


def clusters(unit_NF: sparse.csr_array, n_clusters: int, rng: np.random.Generator) -> Ints:
    """Spherical k-means (Dhillon and Modha, 2001): cluster of each row, by the cosine with the clusters' means."""
    centre_SF = unit_NF[rng.choice(unit_NF.shape[0], n_clusters, replace=False)].toarray()
    nearest_N = np.zeros(unit_NF.shape[0], dtype=np.int64)
    for _ in range(ROUNDS):
        before_N, nearest_N = nearest_N, np.asarray((unit_NF @ centre_SF.T).argmax(1), dtype=np.int64)
        if (before_N == nearest_N).all():
            break
        member_NS = sparse.csr_array(np.eye(n_clusters)[nearest_N])
        sums_SF = (member_NS.T @ unit_NF).toarray()
        norm_S = np.linalg.norm(sums_SF, axis=1)
        centre_SF = np.where(norm_S[:, None] > 0, sums_SF / np.maximum(norm_S, 1e-12)[:, None], centre_SF)
    return nearest_N
