"""The seed model's matrices: dense, or in the file's own few bits and made dense a slice at a time when used.

Shapes: P positions, N inputs, M outputs, R rows of a slice, Q bytes of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from experiments.adapters.seed.package import optional_package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from experiments.adapters.seed.package import SeedFile

SLICE_VALUES = 4 << 20
"""Weights that are dense at a time: 16 MiB of them, so that not even the table of tokens is dense as a whole."""


class FrozenMatrix(nn.Module):
    """A weight [M, N] that is never trained; `packed` keeps it as the file does: 5 bits a weight for Q4_1, not 32."""

    def __init__(self, file: SeedFile, name: str, *, packed: bool) -> None:
        super().__init__()
        tensor = file.tensor(name)
        self._type = tensor.tensor_type
        self.shape = (int(tensor.shape[1]), int(tensor.shape[0]))
        stored = torch.from_numpy(tensor.data.copy())
        self.register_buffer("stored", stored if packed else self._dense(stored), persistent=False)
        self.packed = packed
        self.stored: torch.Tensor

    def forward(self, x_PN: torch.Tensor) -> torch.Tensor:
        """Product with W^T, [..., M]; its gradient needs no dense copy of W kept from forward to backward."""
        if not self.packed:
            return functional.linear(x_PN, self.stored)
        y: torch.Tensor = _PackedProduct.apply(x_PN, self)  # type: ignore[no-untyped-call]
        return y

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows W[index], [..., N]."""
        picked = self.stored[index.flatten()]
        return (self._dense(picked) if self.packed else picked).view(*index.shape, self.shape[1])

    def slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows and their dense weights [R, N] at a time."""
        step = max(1, SLICE_VALUES // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step), self._dense(self.stored[start : start + step])

    def _dense(self, stored_RQ: torch.Tensor) -> torch.Tensor:
        if stored_RQ.dtype == torch.float32:  # what quantised values are stored in are bytes
            return stored_RQ
        values = optional_package("gguf").dequantize(stored_RQ.cpu().numpy(), self._type)
        return torch.from_numpy(values).to(stored_RQ.device)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PN: torch.Tensor, matrix: FrozenMatrix) -> torch.Tensor:  # noqa: ANN401
        ctx.matrix = matrix
        y_PM = x_PN.new_empty(*x_PN.shape[:-1], matrix.shape[0])
        for rows, w_RN in matrix.slices():
            y_PM[..., rows] = functional.linear(x_PN, w_RN)
        return y_PM

    @staticmethod
    def backward(ctx: Any, grad_PM: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        grad_PN = grad_PM.new_zeros(*grad_PM.shape[:-1], ctx.matrix.shape[1])
        for rows, w_RN in ctx.matrix.slices():
            grad_PN += grad_PM[..., rows] @ w_RN
        return grad_PN, None


def vector(file: SeedFile, name: str) -> torch.Tensor:
    """A gain: float32 in the file too."""
    return torch.from_numpy(file.tensor(name).data.copy())
