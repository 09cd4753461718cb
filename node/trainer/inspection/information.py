"""What experts tell of labels: mutual information, beside that with shuffled labels.

With many experts and few tokens the plain estimate is far from zero for labels that mean nothing: what the same
estimate gives for shuffled labels is taken off.
"""

# Shapes: R rows that share a label (tokens, or windows), M pairs of a row, P = R M pairs, S shufflings.

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from common.statistics import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

SHUFFLES = 20
"""Shufflings whose mean and spread are told."""


def mutual_information_bits(expert_P: Ints, label_P: Ints) -> float:
    """Return the mutual information of the two in bits, from their counts."""
    n_labels = int(label_P.max()) + 1
    joint = np.bincount(expert_P * n_labels + label_P).astype(np.float64)
    joint = np.pad(joint, (0, -len(joint) % n_labels)).reshape(-1, n_labels) / len(expert_P)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum()) / math.log(2.0)


def shuffled_bits(expert_RM: Ints, label_R: Ints, rng: np.random.Generator) -> Iterator[float]:
    """Yield without end the mutual information with labels that are shuffled between rows."""
    per_row = expert_RM.shape[1]
    experts_P = expert_RM.ravel()
    while True:
        yield mutual_information_bits(experts_P, rng.permutation(label_R).repeat(per_row))


def excess(expert_RM: Ints, label_R: Ints, rng: np.random.Generator) -> dict[str, float]:
    """Bits with the true labels, and mean and standard deviation of those with labels shuffled between rows."""
    true = mutual_information_bits(expert_RM.ravel(), label_R.repeat(expert_RM.shape[1]))
    shuffled = list(islice(shuffled_bits(expert_RM, label_R, rng), SHUFFLES))
    return {"bits": true, "shuffled_bits": float(np.mean(shuffled)), "shuffled_std": float(np.std(shuffled))}


def middle(values: list[float]) -> tuple[float, float]:
    """Between which bounds 95 % of the values [S] lie."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
