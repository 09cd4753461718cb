"""How long to leave alone what has failed: twice as long after each failure in a row. Pure."""

from __future__ import annotations

import math

MAX_DOUBLINGS = 32
"""Far beyond any limit in seconds, and far below what a float can hold."""


def backoff_s(first_s: float, doublings: int, *, max_doublings: int = MAX_DOUBLINGS, max_s: float = math.inf) -> float:
    """`first_s`, doubled so many times but no more than `max_doublings`, and never more than `max_s`."""
    return min(max_s, first_s * 2.0 ** min(doublings, max_doublings))
