"""A model reads held-out windows, with all of its experts or without some, and it is seen what its gates choose."""

# Shapes: N windows, B of a batch, T positions of a window, K experts per token, V vocabulary, L layers, X experts that
#         are taken away. A window is T + 1 tokens: the inputs, and the targets one later.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch.nn import functional

from common.errors import DivergedError
from node.model.gate import choices_seen, without_experts
from node.model.moe import MoE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from node.model.gate import ChoiceSummary, GateOutput
    from node.model.trunk import Trunk

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    SmallInts = NDArray[np.int32]

MAX_BATCH: Final = 16
MAX_LOGITS: Final = 1 << 26
"""Logits of one batch, unless a single window has more."""


@dataclass(frozen=True, kw_only=True)
class WindowReading:
    """What was read, and what was chosen for it.

    ids_NT: the windows' tokens [N, T + 1].
    nats_N: loss of each window, in nats per token.
    chosen: for each layer the experts of each window's tokens [N, T * K], one token after the other; -1 for none.
    summaries: for each layer what the statistics of gates count.
    """

    ids_NT: Ints
    nats_N: Floats
    chosen: tuple[SmallInts, ...]
    summaries: tuple[ChoiceSummary, ...]

    @property
    def n_tokens(self) -> int:
        """How many tokens were chosen for, which is how many were predicted."""
        return self.ids_NT[:, 1:].size


class Reader:
    """Has `model`, in evaluation mode, read the windows [N, T + 1]; calls `step` after each batch of each pass."""

    def __init__(self, model: Trunk, ids_NT: torch.Tensor, step: Callable[[], None]) -> None:
        self.layers = sorted((part for part in model.modules() if isinstance(part, MoE)), key=lambda part: part.layer)
        self._model, self._ids_NT, self._step = model, ids_NT, step
        self._batch = batch_of(ids_NT.shape[1] - 1, model.vocab_size)
        self._gates = [layer.gate for layer in self.layers]

    @property
    def n_batches(self) -> int:
        """How many batches a pass has."""
        return math.ceil(len(self._ids_NT) / self._batch)

    def read(self) -> WindowReading:
        """Read all with all experts. Raises DivergedError where the loss is no finite number."""
        chosen: list[list[SmallInts]] = [[] for _ in self.layers]
        summaries: list[ChoiceSummary | None] = [None] * len(self.layers)

        def see(layer: int, output: GateOutput) -> None:
            chosen[layer].append(output.expert_ids_TK.cpu().numpy().astype(np.int32))
            known, new = summaries[layer], output.chosen()
            summaries[layer] = new if known is None else known + new

        with choices_seen(self._gates, see):
            nats = [self._nats(part) for part in self._parts()]
        n_windows = len(self._ids_NT)
        return WindowReading(
            ids_NT=self._ids_NT.numpy(),
            nats_N=np.concatenate(nats),
            chosen=tuple(np.concatenate(ids).reshape(n_windows, -1) for ids in chosen),
            summaries=tuple(summary for summary in summaries if summary is not None),
        )

    def rises(self, reading: WindowReading, taken: Sequence[Ints]) -> Floats:
        """By how many nats per token each window's loss [N] rises while of each layer some experts [X] do not answer.

        A batch in which none of them was chosen is not read again: nothing changes in it.
        """
        rise_N = np.zeros(len(self._ids_NT))
        with without_experts(self._gates, [torch.from_numpy(taken_X) for taken_X in taken]):
            for part in self._parts():
                if any(np.isin(ids[part], own).any() for ids, own in zip(reading.chosen, taken, strict=True)):
                    rise_N[part] = self._nats(part) - reading.nats_N[part]
                else:
                    self._step()
        return rise_N

    def _parts(self) -> list[slice]:
        return [slice(start, start + self._batch) for start in range(0, len(self._ids_NT), self._batch)]

    @torch.no_grad()
    def _nats(self, part: slice) -> Floats:
        ids_BT = self._ids_NT[part].to(self._model.device)
        logits_BTV = self._model(ids_BT[:, :-1])
        nats_P = functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        nats_B: Floats = nats_P.view(len(ids_BT), -1).double().mean(1).cpu().numpy()
        if not np.isfinite(nats_B).all():
            raise DivergedError("the loss on the held-out text is no finite number: this model cannot be inspected")
        self._step()
        return nats_B


def batch_of(context: int, vocab_size: int) -> int:
    """How many windows are read at once."""
    return max(1, min(MAX_BATCH, MAX_LOGITS // (context * vocab_size)))
