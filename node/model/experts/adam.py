"""Adam for stacked experts that steps only the experts that got tokens. Last step of a host's backward.

Shapes: E experts of a block, G of them touched.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.adamw import adamw

from node.model.devices import knows_float64

if TYPE_CHECKING:
    from protocol.manifest import OptimizerConfig

SMALL_VALUES = 4096
"""The number of values from which an expert's parameter is stepped where it is, without a copy."""

SETTLED = 2.0**-26
"""What is left of a mean's first value when no float32 number tells Adam's correction for its first steps from 1."""


@dataclass
class AdamState:
    """Moments of every parameter, stacked like it, and each expert's own number of steps (int64 `steps_E`)."""

    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    steps_E: torch.Tensor


def zero_state(params: dict[str, torch.Tensor]) -> AdamState:
    """State before the first step."""
    some = next(iter(params.values()))
    return AdamState(
        first={name: torch.zeros_like(p) for name, p in params.items()},
        second={name: torch.zeros_like(p) for name, p in params.items()},
        steps_E=torch.zeros(len(some), dtype=torch.int64, device=some.device),
    )


def is_all(touched_G: torch.Tensor, n_experts: int) -> bool:
    """Whether experts `touched_G` are all there are, in order: nothing has to be gathered then."""
    return len(touched_G) == n_experts and bool((touched_G[1:] > touched_G[:-1]).all())


def clip_per_expert(grads: dict[str, torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale each expert's gradient in place to at most `max_norm` (L2 over all its parameters).

    Returns `finite_G`: False for experts whose gradient holds NaN or infinity, which must not be stepped.
    """
    norm_G = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    finite_G = torch.isfinite(norm_G)
    scale_G = (max_norm / (norm_G + torch.finfo(norm_G.dtype).tiny)).clamp(max=1.0)
    if bool((scale_G < 1).any()):
        for g in grads.values():
            g.mul_(scale_G.view(-1, *[1] * (g.dim() - 1)))
    return finite_G


def adam_step(
    params: dict[str, torch.Tensor],
    state: AdamState,
    grads: dict[str, torch.Tensor],
    touched_G: torch.Tensor,
    lr: float,
    config: OptimizerConfig,
) -> None:
    """One decoupled-weight-decay Adam step (arXiv 1711.05101) of experts `touched_G` (unique, int64), in place.

    Bias correction uses each expert's own step count, so an expert met for the first time late in a run starts as
    carefully as any other.
    """
    steps_G = state.steps_E.index_select(0, touched_G)
    for name, grad in grads.items():
        tensors = (params[name], state.first[name], state.second[name])
        step = _step_ranges if grad[0].numel() >= SMALL_VALUES else _step_stacked
        step(_Touched(tensors, grad, touched_G, steps_G), lr, config)
    state.steps_E.index_copy_(0, touched_G, steps_G + 1)


class _Touched(NamedTuple):
    """One parameter of the experts of a step: weights and moments of all experts, gradients of the touched ones."""

    tensors: tuple[torch.Tensor, ...]
    grad: torch.Tensor
    touched_G: torch.Tensor
    steps_G: torch.Tensor
    """Taken before this one."""


def _step_ranges(of: _Touched, lr: float, config: OptimizerConfig) -> None:
    """One pass over memory and no copies: neighbours that have taken equally many steps are stepped as one tensor."""
    tensors, grad, touched_G, steps_G = of
    steps_G = steps_G.clamp(max=settled_steps(config))
    starts_N = _range_starts(touched_G, steps_G)
    ends_N = torch.cat((starts_N[1:], starts_N.new_tensor([len(touched_G)])))
    first_N = touched_G[starts_N]
    # The ranges, and what lies before each and after the last: every expert, in order.
    bounds = torch.stack((first_N, first_N + ends_N - starts_N), 1).flatten().tolist()
    sizes = [after - before for before, after in itertools.pairwise((0, *bounds, len(tensors[0])))]
    p, m, v = (t.split(sizes)[1::2] for t in tensors)
    adamw(
        list(p),
        list(grad.split((ends_N - starts_N).tolist())),
        list(m),
        list(v),
        [],
        list(steps_G[starts_N].to(torch.float32).unbind(0)),
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=lr,
        weight_decay=config.weight_decay,
        eps=config.eps,
        maximize=False,
    )


def settled_steps(config: OptimizerConfig) -> int:
    """The steps after which experts are alike to Adam, however many more they take."""
    slowest = max(config.beta1, config.beta2)
    return math.ceil(math.log(SETTLED) / math.log(slowest)) if slowest else 1


def _range_starts(touched_G: torch.Tensor, steps_G: torch.Tensor) -> torch.Tensor:
    """Where, among rising experts, one is not the neighbour of the one before or has not taken as many steps."""
    is_start_G = torch.ones_like(touched_G, dtype=torch.bool)
    is_start_G[1:] = (touched_G.diff() != 1) | (steps_G.diff() != 0)
    return is_start_G.nonzero()[:, 0]


def _step_stacked(of: _Touched, lr: float, config: OptimizerConfig) -> None:
    """Step all experts at once: several passes, and copies unless all are touched, but no work per expert."""
    tensors, grad, touched_G, steps_G = of
    whole = is_all(touched_G, len(tensors[0]))
    p, m, v = tensors if whole else (t.index_select(0, touched_G) for t in tensors)
    m.lerp_(grad, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    if config.weight_decay:
        p.mul_(1 - lr * config.weight_decay)
    # lr * (m / c1) / (sqrt(v / c2) + eps) = lr * m / (sqrt(v) * c1 / sqrt(c2) + eps * c1), in fewer passes.
    steps_G = steps_G if knows_float64(steps_G.device) else steps_G.cpu()
    count = (steps_G + 1).to(torch.float64).view(-1, *[1] * (grad.dim() - 1))
    c1, c2 = 1 - config.beta1**count, 1 - config.beta2**count
    bottom = torch.addcmul((config.eps * c1).to(grad), v.sqrt(), (c1 / c2.sqrt()).to(grad))
    p.addcdiv_(m, bottom, value=-lr)
    if not whole:
        for full, part in zip(tensors, (p, m, v), strict=True):
            full.index_copy_(0, touched_G, part)
