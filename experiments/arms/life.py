"""How experts live: what gates choose as training goes on, and what the model loses without some experts.

Shapes: B sequences, T positions, K experts per token, E experts of a layer, X experts that are taken away.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.arms.specialisation import chosen_experts
from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from experiments.arms.training import AnyModel
    from node.data import TextDataset
    from node.model.gate import ChoiceProbe, GateOutput

    Ints = NDArray[np.int64]

LOOKS = 4
"""Times in a training at which gates are looked at: at the end of each quarter."""

FEW, SOME = 0.01, 0.1
"""Parts of the experts of each layer that are taken away."""

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
    for words, experts in to_take(loads, seed):
        with without(model, experts):
            rise = nats_of(ABLATION_BYTES) - whole
        found.append({"taken": words, "experts": len(experts[0]), "nats": rise})
    return found


def to_take(loads: Sequence[Ints], seed: int) -> Iterator[tuple[str, list[Ints]]]:
    """Which experts of each layer are taken away, in words and by index [X]."""
    n_experts = len(loads[0])
    rng = np.random.default_rng(seed)
    by_load = [load_E.argsort(kind="stable") for load_E in loads]
    at_random = [rng.permutation(n_experts) for _ in loads]
    few, some = (max(1, round(part * n_experts)) for part in (FEW, SOME))
    yield f"{FEW:.0%} at random", [order[:few] for order in at_random]
    yield f"{SOME:.0%} at random", [order[:some] for order in at_random]
    yield f"the busiest {FEW:.0%}", [order[-few:] for order in by_load]
    yield "the idler half", [order[: n_experts // 2] for order in by_load]


@contextmanager
def without(model: AnyModel, experts: Sequence[Ints]) -> Iterator[None]:
    """While it lasts, gates choose as ever, but some experts [X] of each layer do not answer."""
    hooks = [
        layer.gate.register_forward_hook(_loss_of(torch.from_numpy(experts_X).to(model.device)))
        for layer, experts_X in zip(model.layers, experts, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _loss_of(experts_X: torch.Tensor) -> Callable[[torch.nn.Module, object, GateOutput], GateOutput]:
    def lose(_module: torch.nn.Module, _inputs: object, output: GateOutput) -> GateOutput:
        lost_TK = torch.isin(output.expert_ids_TK, experts_X)
        weights_TK = output.weights_TK.masked_fill(lost_TK, 0.0)
        sum_T1 = weights_TK.sum(1, keepdim=True)
        return replace(
            output,
            expert_ids_TK=output.expert_ids_TK.masked_fill(lost_TK, NO_EXPERT),
            weights_TK=weights_TK / sum_T1.clamp(min=torch.finfo(sum_T1.dtype).tiny),
        )

    return lose
