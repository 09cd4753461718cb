"""What a model loses without some of its experts: which are taken away, and what that costs."""

# Shapes: N windows, E experts of a layer, X experts that are taken away.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.statistics import half_width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from node.trainer.inspection.reading import Reader, WindowReading

    Ints = NDArray[np.int64]

FEW, SOME = 0.01, 0.1
"""Parts of the experts of each layer that are taken away."""

N_GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class Rise:
    """By how many nats per token the held-out loss rises, and half the width of its 95 % interval over windows."""

    nats: float
    half_width: float


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is lost without a group of experts, `experts` of each layer that it is of."""

    taken: str
    experts: int
    rise: Rise


def groups_to_take(loads: Sequence[Ints], seed: int) -> Iterator[tuple[str, list[Ints]]]:
    """Which experts of each layer are taken away, in words and by index [X]; `loads` are the pairs [E] of each."""
    n_experts = len(loads[0])
    rng = np.random.default_rng(seed)
    by_load = [load_E.argsort(kind="stable") for load_E in loads]
    at_random = [rng.permutation(n_experts) for _ in loads]
    few, some = (max(1, round(part * n_experts)) for part in (FEW, SOME))
    yield f"{FEW:.0%} at random", [order[:few] for order in at_random]
    yield f"{SOME:.0%} at random", [order[:some] for order in at_random]
    yield f"the busiest {FEW:.0%}", [order[-few:] for order in by_load]
    yield "the idler half", [order[: n_experts // 2] for order in by_load]


def singles_to_take(load_E: Ints, n_each: int, rng: np.random.Generator) -> list[int]:
    """The `n_each` busiest experts of a layer, and as many others at random; all where there are no more."""
    by_load = load_E.argsort(kind="stable")[::-1]
    others = rng.permutation(by_load[n_each:])
    return [int(expert) for expert in (*by_load[:n_each], *others[:n_each])]


def n_passes(n_layers: int, n_experts: int, n_each: int) -> int:
    """How often all windows are read for `n_each` of the busiest experts of each layer and as many others."""
    return n_layers * (min(2 * n_each, n_experts) + 1) + N_GROUPS if n_each else 0


def without_single(reader: Reader, reading: WindowReading, layer: int, expert: int) -> Rise:
    """What is lost without one expert; exactly 0 for one that was not chosen."""
    return _rise(reader, reading, _of_layer(reader, layer, np.array([expert])))


def without_groups(reader: Reader, reading: WindowReading, loads: Sequence[Ints], seed: int) -> list[Ablation]:
    """What is lost without groups of experts of all layers at once, and without all experts of one layer."""
    groups = list(groups_to_take(loads, seed))
    for layer, load_E in enumerate(loads):
        groups.append((f"all of layer {layer}", _of_layer(reader, layer, np.arange(len(load_E)))))
    return [
        Ablation(taken=words, experts=max(map(len, taken)), rise=_rise(reader, reading, taken))
        for words, taken in groups
    ]


def _of_layer(reader: Reader, layer: int, taken_X: Ints) -> list[Ints]:
    nothing = np.zeros(0, dtype=np.int64)
    return [taken_X if index == layer else nothing for index in range(len(reader.layers))]


def _rise(reader: Reader, reading: WindowReading, taken: Sequence[Ints]) -> Rise:
    rise_N = reader.rises(reading, taken)
    return Rise(nats=float(rise_N.mean()), half_width=half_width(rise_N))
