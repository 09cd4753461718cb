"""What both kinds of peer and the benchmark of averaging agree on: the tensors, samples of them, the lines they speak.

No torch here: the benchmark's own process must not map its libraries, since PSS counts a share of what others map too.

Shapes: R rows, C columns, S sampled values.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from typing import TextIO

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

WITHIN = 0.01
BLOCK_TENSORS = 2
"""As an expert of the kind `ffn` has them."""
BLOCK_SHAPE = (32, 3906)
"""Of each tensor of a block: 32 experts, and 1 MB of 1e6 bytes in both; the default manifest's blocks are as large."""
SAMPLED = 4096
"""Values of all tensors; a relative L2 distance over so many is within about a percent of that over all of them."""


def start_tensors(blocks: int, seed: int, peer: int) -> Iterator[Floats]:
    """Random weights `[R, C]`, other ones for each peer and round, block by block."""
    generator = np.random.default_rng((seed, peer))
    for _ in range(blocks * BLOCK_TENSORS):
        yield generator.standard_normal(BLOCK_SHAPE, dtype=np.float32)


def values_per_tensor(blocks: int) -> int:
    """Values of each tensor that are looked at."""
    return max(1, SAMPLED // (blocks * BLOCK_TENSORS))


def sampled(tensors: Iterable[Floats], per_tensor: int) -> Floats:
    """So many values of each tensor, at even distances from one another."""
    flat = (tensor.reshape(-1) for tensor in tensors)
    return np.concatenate([values[:: values.size // per_tensor][:per_tensor] for values in flat])


def worst_distance(samples: Sequence[Floats], target_S: Doubles | None = None) -> float:
    """The largest relative L2 distance of a sample from the target, or from the samples' mean if there is none."""
    stacked_NS = np.stack(samples).astype(np.float64)
    to_S = stacked_NS.mean(axis=0) if target_S is None else target_S
    return float(np.linalg.norm(stacked_NS - to_S, axis=1).max() / np.linalg.norm(to_S))


class Answers:
    """Lines to the benchmark, from any thread. Each tells when, on the clock that all processes of a machine share."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._one_at_a_time = stream, threading.Lock()

    def say(self, event: str, value: object = None) -> None:
        """One line."""
        line = json.dumps({"event": event, "at_s": time.monotonic(), "value": value})
        with self._one_at_a_time:
            self._stream.write(f"{line}\n")

    def say_sample(self, seed: int, values_S: Floats, offset: int = 0) -> None:
        """What the tensors of the round with this seed are like now: their sample, or the part that has changed."""
        data = base64.b64encode(values_S.astype("<f4").tobytes()).decode()
        self.say("sample", {"seed": seed, "offset": offset, "data": data})


@dataclass(frozen=True, kw_only=True)
class Change:
    """A part of a peer's sample, from `offset` on, as it was since `at_s`; its first one is the whole sample."""

    at_s: float
    peer: int
    offset: int
    values_S: Floats


def change_of(said: dict[str, Any], peer: int, seed: int) -> Change | None:
    """What a `sample` line says; None if it is of another round, whose last exchange may end after the peer stopped."""
    if said["value"]["seed"] != seed:
        return None
    values_S = np.frombuffer(base64.b64decode(said["value"]["data"]), dtype="<f4")
    return Change(at_s=said["at_s"], peer=peer, offset=said["value"]["offset"], values_S=values_S)


class Samples:
    """The latest sample of each peer."""

    def __init__(self) -> None:
        self._latest: dict[int, Floats] = {}

    def put(self, change: Change) -> None:
        """One more change, in the order of time."""
        if change.peer in self._latest:
            self._latest[change.peer][change.offset : change.offset + change.values_S.size] = change.values_S
        else:
            self._latest[change.peer] = change.values_S.copy()

    def mean(self) -> Doubles:
        """Of all peers."""
        mean: Doubles = np.stack(list(self._latest.values())).mean(axis=0, dtype=np.float64)
        return mean

    def agree(self, among: Collection[int], target_S: Doubles | None) -> bool:
        """Whether all of these peers are known, and within 1 % of the target, or of their own mean if it is None."""
        known = [self._latest[peer] for peer in among if peer in self._latest]
        return len(known) == len(among) and worst_distance(known, target_S) <= WITHIN


def agreed_at_s(
    changes: Iterable[Change], among: Collection[int], target_S: Doubles | None, since_s: float
) -> float | None:
    """The first moment from `since_s` on at which these peers agreed; None if they never did."""
    samples = Samples()
    for change in sorted(changes, key=lambda change: change.at_s):
        samples.put(change)
        if change.at_s >= since_s and change.peer in among and samples.agree(among, target_S):
            return change.at_s
    return None
