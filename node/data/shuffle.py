"""A shuffled order that can be entered anywhere: position -> window, without a list of all windows.

On the path of a step: which windows a batch holds. A list would cost 8 bytes per window and epoch, and a resumed
trainer would have to draw it again. Here a Feistel network (Luby and Rackoff, 1988) permutes the smallest power of four
that holds all windows, and is applied again to whatever falls outside of them (cycle walking).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    UInts = NDArray[np.uint64]

N_ROUNDS = 6


def mix(values: UInts) -> UInts:
    """The finaliser of splitmix64: every bit of the input reaches every bit of the output."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys_of(seed: int, shard: int, epochs: UInts) -> UInts:
    """One key per entry of `epochs`, different for each (seed, shard, epoch)."""
    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(shard))
    return mix(key ^ epochs)


def shuffled(positions: UInts, n: int, keys: UInts) -> UInts:
    """Where each position in [0, n) goes, in [0, n): for one key, a permutation."""
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    places = _permuted(positions, half_bits, keys)
    while (outside := places >= n).any():
        places[outside] = _permuted(places[outside], half_bits, keys[outside])
    return places


def _permuted(values: UInts, half_bits: int, keys: UInts) -> UInts:
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & low
    for round_number in range(N_ROUNDS):
        left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(round_number))) & low)
    return (left << shift) | right
