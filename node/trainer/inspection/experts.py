"""What single experts are chosen for: tokens, topics, and places in the text. Pure functions of what was chosen."""

# Shapes: N windows, T positions of a window, K experts per token, P = N T K pairs, E experts of a layer, U pairs of an
#         expert and a label that occur, C chosen places.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from common.tokenizer import Tokenizer

    Ints = NDArray[np.int64]

AS_OFTEN: Final = 1.0 - 1e-9
TOKENS_BEFORE, TOKENS_AFTER = 32, 16
CHARS_BEFORE, CHARS_AFTER = 16, 8


@dataclass(frozen=True, kw_only=True)
class Favourite:
    """A label that an expert is chosen for: a token's id, or a topic's number.

    `share` is the part of the expert's pairs that has it, `times` that share over the label's share of all pairs.
    """

    label: int
    pairs: int
    share: float
    times: float


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A token that an expert was chosen for, and the text around it."""

    before: str
    token: str
    after: str


def favourites(expert_P: Ints, label_P: Ints, wanted: Iterable[int], n_each: int) -> dict[int, list[Favourite]]:
    """For each of the experts `wanted` up to `n_each` labels that it has more often than others have, foremost first.

    They are ordered by what each adds to the divergence of the expert's labels from all, share * log(times): a label
    that is rare everywhere does not come first for having been seen once.
    """
    n_labels = int(label_P.max(initial=0)) + 1
    key_U, count_U = np.unique(expert_P * n_labels + label_P, return_counts=True)
    expert_U, label_U = np.divmod(key_U, n_labels)
    share_U = count_U / np.bincount(expert_P, minlength=1)[expert_U]
    times_U = share_U * len(label_P) / np.bincount(label_P, minlength=1)[label_U]
    order_U = np.lexsort((label_U, -count_U, -share_U * np.log(times_U), expert_U))
    order_U = order_U[times_U[order_U] >= AS_OFTEN]
    sorted_U = expert_U[order_U]
    found: dict[int, list[Favourite]] = {}
    for expert in wanted:
        first, last = np.searchsorted(sorted_U, [expert, expert + 1])
        found[expert] = [
            Favourite(
                label=int(label_U[place]),
                pairs=int(count_U[place]),
                share=float(share_U[place]),
                times=float(times_U[place]),
            )
            for place in order_U[first : min(last, first + n_each)]
        ]
    return found


def places(expert_P: Ints, wanted: Iterable[int], n_each: int) -> dict[int, Ints]:
    """For each of the experts `wanted` up to `n_each` of its pairs [C], spread evenly over all that it has."""
    by_expert_P = expert_P.argsort(kind="stable")
    sorted_P = expert_P[by_expert_P]
    found: dict[int, Ints] = {}
    for expert in wanted:
        first, last = np.searchsorted(sorted_P, [expert, expert + 1])
        n_places = min(n_each, last - first)
        chosen_C = first + (2 * np.arange(n_places) + 1) * (last - first) // max(1, 2 * n_places)
        found[expert] = by_expert_P[chosen_C]
    return found


def context_of(ids_T: Ints, place: int, tokenizer: Tokenizer) -> Surroundings:
    """The token at `place` of a window, and the text around it as far as the window goes."""
    before = _text(tokenizer, ids_T[max(0, place - TOKENS_BEFORE) : place])
    after = _text(tokenizer, ids_T[place + 1 : place + 1 + TOKENS_AFTER])
    return Surroundings(
        before=before[-CHARS_BEFORE:], token=token_text(tokenizer, int(ids_T[place])), after=after[:CHARS_AFTER]
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""What a token stands for; bytes that are no text of their own are written like `\xe2`."""
    return tokenizer.decode([token]).decode("utf-8", "backslashreplace")


def _text(tokenizer: Tokenizer, ids_T: Ints) -> str:
    return tokenizer.decode(ids_T.tolist()).decode("utf-8", "replace")
