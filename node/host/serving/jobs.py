"""What a request is once it is checked: jobs for the runtime, what they yield, and several requests' inputs as one.

Shapes: T tokens, P pairs, D model width.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from node.model.pairs import Inputs, Pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.host.serving.activation_cache import CheckedInputs, RequestKey


@dataclass(frozen=True)
class ForwardResult:
    """Weighted sums of one request, and the highest version among the blocks that it touched."""

    combined_TD: torch.Tensor
    version: int


@dataclass(frozen=True)
class BackwardResult:
    """Gradients of one request, whether it stepped the experts, and how old it was (optimizer steps)."""

    tokens_TD: torch.Tensor
    weight_P: torch.Tensor
    stepped: bool
    staleness: int


@dataclass(frozen=True, kw_only=True)
class ForwardJob:
    """One Forward request, checked."""

    key: RequestKey
    inputs: CheckedInputs
    keep: bool
    deadline: float
    future: Future[ForwardResult] = field(default_factory=Future)

    @property
    def n_tokens(self) -> int:
        """Rows of the request."""
        return len(self.inputs.x_TD)


@dataclass(frozen=True, kw_only=True)
class BackwardJob:
    """One Backward request, checked; `inputs` is None unless the caller sent them again.

    `version` is what the forward's answer said. A caller that omits it is at version 0: as stale as can be, so that
    silence never buys a larger step.
    """

    key: RequestKey
    grad_TD: torch.Tensor
    inputs: CheckedInputs | None
    run_tokens: int
    deadline: float
    version: int = 0
    no_step: bool = False
    future: Future[BackwardResult] = field(default_factory=Future)

    @property
    def n_tokens(self) -> int:
        """Rows of the request."""
        return len(self.grad_TD)


Job = ForwardJob | BackwardJob


def merged_inputs(parts: Sequence[Inputs]) -> Inputs:
    """Several requests of one layer as one: each part's pairs point at its own rows of the joint tokens."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts[:-1]:
        starts.append(starts[-1] + len(part.x_TD))
    return Inputs(
        x_TD=torch.cat([part.x_TD for part in parts]),
        pairs=Pairs(
            token_P=torch.cat([part.pairs.token_P + start for part, start in zip(parts, starts, strict=True)]),
            expert_P=torch.cat([part.pairs.expert_P for part in parts]),
            weight_P=torch.cat([part.pairs.weight_P for part in parts]),
        ),
    )
