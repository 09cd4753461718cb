"""Gates that nobody would use: nulls that a learnt gate has to beat.

Shapes: B sequences, T tokens, D d_model, E experts of a layer, K experts per token, Q heads, N experts of a head, or
tokens of all sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from node.model.gate import Gate, build_gate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.arms.arm import Arm
    from protocol.manifest import ModelConfig

TABLE_ROWS = 2**16
"""Every pair of bytes has a row; longer contexts share them."""

MULTIPLIER = 0x9E3779B1
"""A large odd number (Fibonacci hashing, Knuth, "The Art of Computer Programming", volume 3, 6.4)."""


class TableGate(Gate):
    """K experts by fixed random tables over the last bytes, evenly weighted (hash layers, arXiv 2106.04426).

    With one head by the last two bytes; with more each head's part by one byte more: two, three and so on. Two bytes at
    least, because one has 256 values, which could reach no more than 256 K experts. What the tokens are is not in x_TD:
    `watch` has the model tell it. For one forward at a time.
    """

    def __init__(self, model: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(model)
        per_head = self.experts_per_token // self.n_heads
        first_QX1 = torch.randint(self.n_experts, (self.n_heads, TABLE_ROWS, 1), generator=generator)
        # Distinct experts of a row: a random start, and steps that never come round.
        shape = (self.n_heads, TABLE_ROWS, per_head)
        stride_QXN = torch.randint(max(1, self.n_experts // per_head), shape, generator=generator) + 1
        stride_QXN[:, :, 0] = 0
        self.register_buffer("table_QXN", (first_QX1 + stride_QXN.cumsum(2)) % self.n_experts, persistent=False)
        self.table_QXN: Tensor
        self._row_TQ = torch.zeros(0, self.n_heads, dtype=torch.int64)

    def watch(self, model: nn.Module) -> None:
        """Take the bytes from the inputs of `model`."""
        model.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._row_TQ = context_rows(inputs[0].long(), range(2, self.n_heads + 2), TABLE_ROWS)

    def choose(self, x_TD: Tensor, live_E: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - all are live here
        """Choose K experts for each token; see `Gate.choose`. Two heads may choose the same one, which counts twice."""
        ids = [table_XN[row_T] for table_XN, row_T in zip(self.table_QXN, self._row_TQ.unbind(1), strict=True)]
        ids_TK = torch.cat(ids, 1)
        return ids_TK, x_TD.new_zeros(ids_TK.shape)


def context_rows(ids_BT: Tensor, lengths: range, n_rows: int) -> Tensor:
    """Rows [N, Q] of tables, each by as many of a token's last bytes as `lengths` say; zeros come before the first."""
    context_BT, rows = ids_BT, [ids_BT % n_rows]
    for back in range(1, lengths.stop - 1):
        earlier_BT = functional.pad(ids_BT, (back, 0))[:, : ids_BT.shape[1]]
        context_BT = (earlier_BT * 256 + context_BT) if back == 1 else (context_BT * MULTIPLIER + earlier_BT) % (2**31)
        rows.append((context_BT if back == 1 else context_BT * MULTIPLIER // 2**15) % n_rows)
    return torch.stack(rows[lengths.start - 1 :], 2).flatten(0, 1)


def frozen(gate: Gate) -> Gate:
    """The gate as it starts, for ever: only the balancing biases go on moving."""
    return gate.requires_grad_(requires_grad=False)


def gate_of(arm: Arm, model: ModelConfig, generator: torch.Generator) -> Gate:
    """An arm's gate for one layer: one of the product's, or a null."""
    gate = TableGate(model, generator) if arm.has_table else build_gate(model, generator)
    return frozen(gate) if arm.frozen_gate else gate
