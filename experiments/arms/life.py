"""How experts live: what gates choose as training goes on, and what the model loses without some experts.

Shapes: B sequences, T positions, K experts per token, E experts of a layer, X experts that are taken away.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.arms.specialisation import chosen_experts
from node.model.gate import without_experts
from node.model.pairs import NO_EXPERT
from node.trainer.inspection.ablation import groups_to_take

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from experiments.arms.training import AnyModel
    from node.data import TextDataset
    from node.model.gate import ChoiceProbe

    Ints = NDArray[np.int64]

LOOKS = 4
"""Times in a training at which gates are looked at: at the end of each quarter."""

ABLATION_BYTES = 32_768


@torch.no_grad()
def look(model: AnyModel, probe: ChoiceProbe, ids_BT: torch.Tensor) -> list[dict[str, Any]]:
    """Return the statistics of each layer's gate after a look at what it chooses for held-out windows [B, T + 1]."""
    model.trunk.eval()
    with probe.looking(ids_BT):
        model.trunk(ids_BT[:, :-1].to(model.device))
    return [asdict(layer.gate.stats()) for layer in model.layers]


def held_out_loads(model: AnyModel, dataset: TextDataset, batch: int) -> list[Ints]:
    """Return the pairs [E] that each expert of each layer has of held-out text."""
    chosen, _ = chosen_experts(model, dataset, batch)
    n_experts = model.manifest.model.experts_per_layer
    return [np.bincount(ids[ids != NO_EXPERT], minlength=n_experts) for ids in chosen]


def busiest_blocks(loads: Sequence[Ints]) -> list[float]:
    """Return for each layer the load of the busiest block over the mean, were there sqrt(E) blocks."""
    blocks = [[part.sum() for part in np.array_split(load_E, math.isqrt(len(load_E)))] for load_E in loads]
    return [float(max(parts) / np.mean(parts)) for parts in blocks]


def ablations(
    model: AnyModel, loads: Sequence[Ints], seed: int, nats_of: Callable[[int], float]
) -> list[dict[str, Any]]:
    """Return what held-out nats per byte rise by without some of each layer's experts, `experts` of them.

    A token that had them makes do with its others, or with none. `nats_of` measures the model on so many bytes.
    """
    whole = nats_of(ABLATION_BYTES)
    found = []
    for words, experts in groups_to_take(loads, seed):
        with without(model, experts):
            rise = nats_of(ABLATION_BYTES) - whole
        found.append({"taken": words, "experts": len(experts[0]), "nats": rise})
    return found


@contextmanager
def without(model: AnyModel, experts: Sequence[Ints]) -> Iterator[None]:
    """While it lasts, gates choose as ever, but some experts [X] of each layer do not answer."""
    gates = [layer.gate for layer in model.layers]
    with without_experts(gates, [torch.from_numpy(experts_X) for experts_X in experts]):
        yield
