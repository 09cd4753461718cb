"""What averaging sees of a replica: named tensors in rows, and when it may touch them. Blocks and the trunk look alike.

A row is what learns as one: an expert of a block, or the whole trunk. Live tensors are touched only inside `call`,
which runs between batches (hosts) or between steps (trainers).

Shapes: R rows, ... the parameter's own shape.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch


R = TypeVar("R")

GROUPS = ("params", "first", "second")


class TensorSchema(NamedTuple):
    """One tensor of a replica: `params.NAME`, or Adam's moments of it as `first.NAME` and `second.NAME`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(kw_only=True)
class ReplicaState:
    """Tensors of a replica: live ones, or copies. Every tensor begins with the R rows.

    `first` and `second` may lack parameters that Adam does not step (the gate's biases). `steps_R` (int64) counts
    optimizer steps, `learnt_R` (float64) the tokens that this replica itself has learnt from, ever.
    """

    params: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    steps_R: torch.Tensor
    learnt_R: torch.Tensor
    version: int

    def groups(self) -> tuple[tuple[str, dict[str, torch.Tensor]], ...]:
        """The three groups of tensors, by name."""
        return tuple(zip(GROUPS, (self.params, self.first, self.second), strict=True))

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor but the counters, as `params.NAME` and so on, in the order of `schema`."""
        named = {f"{group}.{name}": t for group, tensors in self.groups() for name, t in tensors.items()}
        return {name: named[name] for name in sorted(named)}

    def copy(self) -> ReplicaState:
        """Copy the values to the CPU, where training no longer changes them."""
        params, first, second = (_copied(tensors) for _, tensors in self.groups())
        return ReplicaState(
            params=params,
            first=first,
            second=second,
            steps_R=self.steps_R.cpu().clone(),
            learnt_R=self.learnt_R.cpu().clone(),
            version=self.version,
        )

    def copy_weights(self) -> ReplicaState:
        """Copy the values without Adam's moments."""
        return replace(self, first={}, second={}).copy()


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # One copy, also from a GPU.
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def schema(state: ReplicaState) -> tuple[TensorSchema, ...]:
    """Names, shapes and types, sorted by name."""
    return tuple(TensorSchema(name, tuple(t.shape), t.dtype) for name, t in state.named().items())


def schema_hash(tensors: tuple[TensorSchema, ...]) -> bytes:
    """SHA-256 of a schema: replicas that differ in it have nothing to average."""
    return hashlib.sha256(repr([(t.name, t.shape, str(t.dtype)) for t in tensors]).encode()).digest()
