"""Do gates go on choosing the same experts for the same tokens? Beside the path of a step.

An expert can only become good at tokens that come back to it.
"""

# Shapes: B sequences, T positions, N tokens, K experts per token.

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from node.model.gate.base import Gate, GateOutput


def kept_fraction(before_NK: Tensor, now_NK: Tensor) -> float:
    """The part of the experts chosen before, -1 being none, that the same tokens have now; 0 where there were none."""
    was_NK = before_NK >= 0
    kept_NK = (before_NK[:, :, None] == now_NK[:, None, :]).any(2) & was_NK
    return float(kept_NK.sum() / was_NK.sum().clamp(min=1))


class ChoiceProbe:
    """Writes into each gate's statistics what part of the experts of some tokens it kept since the last look at them.

    A look at other tokens than the last begins anew. For one look at a time; forwards on other threads are not seen.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = tuple(gates)
        self._thread: int | None = None
        self._ids_BT: Tensor | None = None
        self._before: dict[nn.Module, Tensor] = {}
        self._found: dict[nn.Module, Tensor] = {}
        for gate in self._gates:
            gate.register_forward_hook(self._take)

    @contextmanager
    def looking(self, ids_BT: Tensor) -> Iterator[None]:
        """See what the gates choose in this thread's forward over `ids_BT`; a block that fails does not count."""
        self._thread, self._found = threading.get_ident(), {}
        try:
            yield
        finally:
            self._thread = None
        if self._ids_BT is not None and torch.equal(ids_BT, self._ids_BT):
            for gate in self._gates:
                gate.kept_fraction = kept_fraction(self._before[gate], self._found[gate])
        self._ids_BT, self._before = ids_BT, self._found

    def _take(self, gate: nn.Module, _inputs: object, output: GateOutput) -> None:
        if self._thread == threading.get_ident():
            self._found[gate] = output.expert_ids_TK.cpu()
