"""Do experts specialise? Mutual information between the experts chosen and labels, beside that with shuffled labels.

With many experts and few tokens the plain estimate is far from zero for labels that mean nothing: what the same
estimate gives for shuffled labels is taken off. For topics whole windows are shuffled, as the bytes of one belong
together.

Shapes: N windows, T positions, K experts per token, E experts, R rows that share a label
(tokens, or windows), M pairs of a row, P = N T K pairs, X pairs of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.arms.labels import Topics, byte_classes
from node.model.gate import choices_seen
from node.trainer.inspection.information import excess

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from experiments.arms.training import AnyModel
    from node.data import TextDataset

    Ints = NDArray[np.int64]

WINDOWS = 256


@torch.no_grad()
def chosen_experts(model: AnyModel, dataset: TextDataset, batch: int) -> tuple[list[Ints], Ints]:
    """Return each layer's experts of held-out windows [N, T * K], and the bytes of those windows [N, T]."""
    chosen: list[list[Ints]] = [[] for _ in model.layers]
    windows = []
    context = model.manifest.model.context
    model.trunk.eval()
    with choices_seen(
        [layer.gate for layer in model.layers],
        lambda index, output: chosen[index].append(output.expert_ids_TK.cpu().numpy()),
    ):
        for ids in dataset.held_out_batches(batch, context, WINDOWS * context):
            model.trunk(ids[:, :-1].to(model.device))
            windows.append(ids[:, :-1].numpy())
    bytes_NT = np.concatenate(windows)
    return [np.concatenate(ids).reshape(len(bytes_NT), -1) for ids in chosen], bytes_NT


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
