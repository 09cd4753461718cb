"""How experts live: what gates choose as training goes on, and what the model loses without some experts.

Shapes: B sequences, T positions, K experts per token, E experts of a layer, X experts that are taken away.
"""

from __future__ import annotations

import math
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
    from node.data import ByteDataset
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


def ablations(
    model: AnyModel, dataset: ByteDataset, batch: int, seed: int, nats_of: Callable[[int], float]
) -> list[dict[str, Any]]:
    """Return what held-out nats per byte rise by without some of each layer's experts, `experts` of them.

    A token that had them makes do with its others, or with none. `nats_of` measures the model on so many bytes.
    """
    whole = nats_of(ABLATION_BYTES)
    found = []
    for words, experts in _to_take(model, dataset, batch, seed):
        with _Without(model, experts):
            rise = nats_of(ABLATION_BYTES) - whole
        found.append({"taken": words, "experts": len(experts[0]), "nats": rise})
    return found


def busiest_blocks(model: AnyModel, dataset: ByteDataset, batch: int) -> list[float]:
    """Return for each layer the load of the busiest block on held-out text over the mean, were there sqrt(E) blocks."""
    n_experts = model.manifest.model.experts_per_layer
    chosen, _ = chosen_experts(model, dataset, batch)
    loads = [np.bincount(ids[ids >= 0], minlength=n_experts) for ids in chosen]
    blocks = [[part.sum() for part in np.array_split(load_E, math.isqrt(n_experts))] for load_E in loads]
    return [float(max(parts) / np.mean(parts)) for parts in blocks]


def _to_take(model: AnyModel, dataset: ByteDataset, batch: int, seed: int) -> Iterator[tuple[str, list[Ints]]]:
    """Which experts of each layer are taken away, in words and by index [X]."""
    n_experts = model.manifest.model.experts_per_layer
    rng = np.random.default_rng(seed)
    chosen, _ = chosen_experts(model, dataset, batch)
    by_load = [np.bincount(ids.ravel() + 1, minlength=n_experts + 1)[1:].argsort(kind="stable") for ids in chosen]
    at_random = [rng.permutation(n_experts) for _ in chosen]
    few, some = (max(1, round(part * n_experts)) for part in (FEW, SOME))
    yield f"{FEW:.0%} at random", [order[:few] for order in at_random]
    yield f"{SOME:.0%} at random", [order[:some] for order in at_random]
    yield f"the busiest {FEW:.0%}", [order[-few:] for order in by_load]
    yield "the idler half", [order[: n_experts // 2] for order in by_load]


class _Without:
    """While it lasts, gates choose as ever, but some experts [X] of each layer do not answer."""

    def __init__(self, model: AnyModel, experts: Sequence[Ints]) -> None:
        self._model, self._experts = model, experts

    def __enter__(self) -> None:
        self._hooks = [
            layer.gate.register_forward_hook(_loss_of(torch.from_numpy(experts_X).to(self._model.device)))
            for layer, experts_X in zip(self._model.layers, self._experts, strict=True)
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
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
