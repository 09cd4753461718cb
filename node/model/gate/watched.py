"""What gates choose, seen from outside, and what is left where some experts do not answer. Beside the path of a step.

Both last for a block of code, and change no gate.
"""

# Shapes: T tokens, K experts per token, X experts that are taken away.

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from node.model.pairs import NO_EXPERT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from node.model.gate.base import Gate, GateOutput


@contextmanager
def choices_seen(gates: Sequence[Gate], see: Callable[[int, GateOutput], None]) -> Iterator[None]:
    """While it lasts, `see` is given each gate's index among `gates` and what it has chosen, forward by forward."""
    with ExitStack() as stack:
        for index, gate in enumerate(gates):
            stack.callback(gate.register_forward_hook(partial(_see, partial(see, index))).remove)
        yield


@contextmanager
def without_experts(gates: Sequence[Gate], taken: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, gates choose as ever, but of each the experts `taken` [X] do not answer.

    A token that had them makes do with its other experts, or with none.
    """
    with ExitStack() as stack:
        for gate, taken_X in zip(gates, taken, strict=True):
            stack.callback(gate.register_forward_hook(partial(_lose, taken_X)).remove)
        yield


def _see(see: Callable[[GateOutput], None], _gate: nn.Module, _inputs: object, output: GateOutput) -> None:
    see(output)


def _lose(taken_X: Tensor, _gate: nn.Module, _inputs: object, output: GateOutput) -> GateOutput:
    lost_TK = torch.isin(output.expert_ids_TK, taken_X.to(output.expert_ids_TK.device))
    weights_TK = output.weights_TK.masked_fill(lost_TK, 0.0)
    sum_T1 = weights_TK.sum(1, keepdim=True)
    return replace(
        output,
        expert_ids_TK=output.expert_ids_TK.masked_fill(lost_TK, NO_EXPERT),
        weights_TK=weights_TK / sum_T1.clamp(min=torch.finfo(sum_T1.dtype).tiny),
    )
