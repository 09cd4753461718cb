"""Tables of n-grams: rows looked up by the last bytes and added to the trunk's input. A null of experts by codes.

Experts that are chosen by codes of the last bytes are memories of contexts, among other things. Tables of as many
parameters are nothing else (arXiv 2601.07372, 2501.16975), and cost next to no FLOPs.

Shapes: B sequences, T positions, N = B * T tokens, D d_model, Q tables, R rows of a table, U rows that a step uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from experiments.arms.arm import N_TABLES
from experiments.arms.gates import context_rows
from node.model.learning_rate import learning_rate_factor

if TYPE_CHECKING:
    from protocol.manifest import Manifest


class NgramTables(nn.Module):
    """Its rows start at zero, and step by Adam when a backward has reached them, like experts: no other optimizer does.

    `run_tokens` is the place in the schedule of the rate, which is the experts'. For one forward at a time.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        super().__init__()
        self.run_tokens = 0
        self._optimizer = manifest.optimizer
        shape = (N_TABLES, rows, manifest.model.d_model)
        for name, size in {"rows_QRD": shape, "mean_QRD": shape, "square_QRD": shape, "steps_QR": shape[:2]}.items():
            self.register_buffer(name, torch.zeros(size), persistent=False)
        self.rows_QRD: Tensor
        self.mean_QRD: Tensor
        self.square_QRD: Tensor
        self.steps_QR: Tensor
        self._row_NQ = torch.zeros(0, N_TABLES, dtype=torch.int64)

    def watch(self, trunk: nn.Module) -> None:
        """Take the bytes from the inputs of `trunk`, and add to what its first layer gets."""
        trunk.register_forward_pre_hook(self._take)
        trunk.layers[0].register_forward_pre_hook(self._add)  # type: ignore[index, union-attr]

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._row_NQ = context_rows(inputs[0].long(), range(1, N_TABLES + 1), self.rows_QRD.shape[1])

    def _add(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD, *others = inputs
        tables = zip(self._row_NQ.T, self.rows_QRD, strict=True)
        sum_BTD = torch.stack([functional.embedding(row_N, rows_RD) for row_N, rows_RD in tables]).sum(0).view_as(x_BTD)
        return (_Added.apply(x_BTD, sum_BTD, self), *others)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def learn(self, grad_ND: Tensor) -> None:
        """Step the rows of the last forward by the gradient of their sum."""
        adam = self._optimizer
        lr = adam.expert_lr * learning_rate_factor(adam, self.run_tokens)
        for table, row_N in enumerate(self._row_NQ.T):
            row_U, use_N = row_N.unique(return_inverse=True)
            grad_UD = grad_ND.new_zeros(len(row_U), grad_ND.shape[1]).index_add_(0, use_N, grad_ND)
            self.steps_QR[table, row_U] += 1
            steps_U1 = self.steps_QR[table, row_U, None]
            mean_UD = self.mean_QRD[table, row_U].lerp_(grad_UD, 1 - adam.beta1)
            square_UD = self.square_QRD[table, row_U].lerp_(grad_UD.square(), 1 - adam.beta2)
            self.mean_QRD[table, row_U], self.square_QRD[table, row_U] = mean_UD, square_UD
            scale_UD = (square_UD / (1 - adam.beta2**steps_U1)).sqrt_().add_(adam.eps)
            self.rows_QRD[table, row_U] -= lr * (mean_UD / (1 - adam.beta1**steps_U1)) / scale_UD


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, sum_BTD: Tensor, tables: NgramTables) -> Tensor:  # noqa: ANN401
        ctx.tables = tables
        return x_BTD + sum_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        ctx.tables.learn(grad_BTD.flatten(0, 1))
        return grad_BTD, None, None
