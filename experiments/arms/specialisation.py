"""Do experts specialise? Mutual information between the experts chosen and labels, beside that with shuffled labels.

With many experts and few tokens the plain estimate is far from zero for labels that mean nothing: what the same
estimate gives for shuffled labels is taken off. For topics whole windows are shuffled, as the bytes of one belong
together.

Shapes: N windows, T positions, K experts per token, E experts, R rows that share a label
(tokens, or windows), M pairs of a row, P = N T K pairs, X pairs of a window.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.arms.labels import Topics, byte_classes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from experiments.arms.training import AnyModel
    from node.data import TextDataset
    from node.model.gate import GateOutput

    Ints = NDArray[np.int64]

SHUFFLES = 20
WINDOWS = 256


def mutual_information_bits(expert_P: Ints, label_P: Ints) -> float:
    """Return the mutual information of the two in bits, from their counts."""
    n_labels = int(label_P.max()) + 1
    joint = np.bincount(expert_P * n_labels + label_P).astype(np.float64)
    joint = np.pad(joint, (0, -len(joint) % n_labels)).reshape(-1, n_labels) / len(expert_P)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum()) / math.log(2.0)


def excess(expert_RM: Ints, label_R: Ints, rng: np.random.Generator) -> dict[str, float]:
    """Bits with the true labels, and mean and standard deviation of those with labels shuffled between rows."""
    per_row = expert_RM.shape[1]
    experts_P = expert_RM.ravel()
    true = mutual_information_bits(experts_P, label_R.repeat(per_row))
    shuffled = [mutual_information_bits(experts_P, rng.permutation(label_R).repeat(per_row)) for _ in range(SHUFFLES)]
    return {"bits": true, "shuffled_bits": float(np.mean(shuffled)), "shuffled_std": float(np.std(shuffled))}


@torch.no_grad()
def chosen_experts(model: AnyModel, dataset: TextDataset, batch: int) -> tuple[list[Ints], Ints]:
    """Return each layer's experts of held-out windows [N, T * K], and the bytes of those windows [N, T]."""
    chosen: list[list[Ints]] = [[] for _ in model.layers]
    hooks = [layer.gate.register_forward_hook(_collector(chosen[index])) for index, layer in enumerate(model.layers)]
    windows = []
    context = model.manifest.model.context
    try:
        model.trunk.eval()
        for ids in dataset.held_out_batches(batch, context, WINDOWS * context):
            model.trunk(ids[:, :-1].to(model.device))
            windows.append(ids[:, :-1].numpy())
    finally:
        for hook in hooks:
            hook.remove()
    bytes_NT = np.concatenate(windows)
    return [np.concatenate(ids).reshape(len(bytes_NT), -1) for ids in chosen], bytes_NT


def _collector(into: list[Ints]) -> Callable[[torch.nn.Module, object, GateOutput], None]:
    def collect(_module: torch.nn.Module, _inputs: object, output: GateOutput) -> None:
        into.append(output.expert_ids_TK.cpu().numpy())

    return collect


def specialisation(model: AnyModel, dataset: TextDataset, batch: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """Return the excess by label for each layer; see `excess`. A window's topic is that of its first byte."""
    per_layer, bytes_NT = chosen_experts(model, dataset, batch)
    context = bytes_NT.shape[1]
    n_windows = (len(dataset.held_out) - 1) // context
    starts_N = np.arange(len(bytes_NT), dtype=np.int64) * n_windows // len(bytes_NT) * context
    topic_N = Topics(dataset).held_out_X[starts_N].astype(np.int64)
    class_R = byte_classes()[bytes_NT].astype(np.int64).ravel()
    rng = np.random.default_rng(seed)
    found: dict[str, list[dict[str, float]]] = {"byte class": [], "topic": []}
    for expert_NX in per_layer:
        found["byte class"].append(excess(expert_NX.reshape(len(class_R), -1), class_R, rng))
        found["topic"].append(excess(expert_NX, topic_N, rng))
    return found
