"""What one exchange does to a replica: pure arithmetic of work-weighted, clipped gossip. No sockets, no clocks.

Two replicas move towards each other along the line between them (arXiv 1710.06952), weighted by the work of each, and
no partner, whatever it sends, moves a row by more than a fraction of the row's own norm (arXiv 2202.01545).

Shapes: R rows of a replica (experts of a block, or one row for the trunk), ... a parameter's own shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.errors import InvalidInputError, LimitExceededError
from node.model.devices import knows_float64
from protocol.announcements import MAX_DIVERGENCE
from protocol.limits import MAX_RUN_TOKENS
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from node.model.replica_state import ReplicaState
    from protocol.manifest import BlockId, Manifest

MAX_LEAD_STEPS = 1_000_000
"""A partner's step counts are believed up to this far ahead of one's own: a forged one cannot run off the scale."""

_SAFE_NORMS = (1e-12, 1e18)
"""No square that matters has left float32's range where a norm, taken in float32, is between these."""

_ROUNDING = 8
"""A clipped move is shorter than it may be by so many units of rounding, which then do not take it beyond."""

_SECOND_SLACK = 1.01
"""Moments travel rounded (bf16: 1/256), so an honest one may be a little over its limit."""


@dataclass(frozen=True, kw_only=True)
class GossipLimits:
    """What is believed of a partner.

    It moves a row by at most `clip_radius` times the row's norm. Its second moments are at most `max_second`, its first
    moments at most `first_bound` times the square root of the second.
    """

    clip_radius: float
    max_second: float
    first_bound: float

    @classmethod
    def from_manifest(cls, manifest: Manifest, block_id: BlockId) -> GossipLimits:
        """Limits for a block or the trunk. Gradients are clipped, so no average of their squares is over the clip's."""
        adam = manifest.optimizer
        max_norm = adam.grad_clip if block_id == TRUNK else adam.expert_grad_clip
        return cls(
            clip_radius=manifest.averaging.clip_radius,
            max_second=max_norm**2,
            first_bound=first_bound(adam.beta1, adam.beta2),
        )


@dataclass(frozen=True, kw_only=True)
class Move:
    """What one side does after an exchange.

    `delta` is the partner's parameters minus one's own as both sides know it, unclipped, for every parameter;
    `alpha_R` (float64) how much of it is taken. `first` and `second` are the partner's moments, checked by
    `checked_moments`, or empty where none were sent; `steps_R` (int64), taken over with moments only, and `version` are
    the partner's counters.
    """

    delta: dict[str, torch.Tensor]
    alpha_R: torch.Tensor
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    steps_R: torch.Tensor
    version: int


class Applied(NamedTuple):
    """What a move did: rows that were clipped, and how far the partner was before, relative to one's own norm."""

    clipped_rows: int
    divergence: float


def first_bound(beta1: float, beta2: float) -> float:
    """Largest |first| / sqrt(second) that Adam's averages can reach from zero, by Cauchy and Schwarz.

    The bound is infinite unless beta1**2 < beta2: then it is what a steady or a single gradient yields, and larger
    ratios, which blow Adam up, are cut down to that.
    """
    if beta1**2 < beta2:
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    return max(1.0, (1 - beta1) / math.sqrt(1 - beta2))


def share_R(work_R: torch.Tensor, partner_work_R: torch.Tensor) -> torch.Tensor:  # noqa: N802 - suffix: result's shape
    """How far to go towards the partner, 0 to 1 (float64): its part of the work of both; 1/2 where neither did any.

    The shares of both sides add up to 1, so both end at the same point, and with equal work their mean stays.

    Raises:
        InvalidInputError: tokens of work that are not counts, or not one for each row.
    """
    own_R, partner_R = work_R.to("cpu", torch.float64), partner_work_R.to("cpu", torch.float64)
    if own_R.shape != partner_R.shape or own_R.dim() != 1:
        raise InvalidInputError("work", f"has shape {tuple(partner_R.shape)}, must have {tuple(own_R.shape)}")
    for some_R in (own_R, partner_R):
        if not bool(((some_R >= 0) & (some_R <= MAX_RUN_TOKENS)).all()):
            raise InvalidInputError("work", f"must be from 0 to {MAX_RUN_TOKENS} tokens for each row")
    total_R = own_R + partner_R
    return torch.where(total_R > 0, partner_R / total_R, 0.5)


def relative_distance(delta: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> float:
    """L2 norm of `delta` over that of `own`, all rows together; at most MAX_DIVERGENCE, also where `own` is zero."""
    return _ratio(_row_norms(delta), _row_norms(own))


def checked_moments(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], limits: GossipLimits
) -> None:
    """Check a partner's moments, which must be ours to change: `first` is cut in place to what `second` allows.

    A forged pair could otherwise make Adam's first / sqrt(second), and so its next step, as long as it likes. Averages
    of two pairs within the bound are within it too, as the square root is concave.

    Raises:
        InvalidInputError: moments of other names or shapes, not finite, or squares below 0.
        LimitExceededError: squares over `max_second`.
    """
    if first.keys() != second.keys():
        raise InvalidInputError("second", "has other names than first")
    for name, first_moment in first.items():
        if first_moment.shape != second[name].shape:
            raise InvalidInputError(f"second.{name}", f"must have the shape of first, {tuple(first_moment.shape)}")
        _check_finite(f"first.{name}", first_moment)
        _check_finite(f"second.{name}", second[name])
        _check_second(f"second.{name}", second[name], limits.max_second * _SECOND_SLACK)
    for name, first_moment in first.items():
        bound = second[name].sqrt().mul_(limits.first_bound)
        first_moment.clamp_(-bound, bound)


@torch.no_grad()
def apply_move(state: ReplicaState, move: Move, limits: GossipLimits) -> Applied:
    """Move live tensors in place, on whatever device they are.

    Parameters move by adding, so that steps taken since the snapshot stay; moments move to a mixture, so that squares
    stay squares. After it, an Adam step without gradient moves no weight by more than
    lr * first_bound * sqrt(1 - beta2**t) / (1 - beta1**t), t the row's steps, if that held before.

    Raises:
        InvalidInputError: a move that does not fit, or whose outcome is not finite. Nothing has changed then.
    """
    _check_fits(state, move)
    distance_R, own_R = _row_norms(move.delta), _row_norms(state.params)
    scale_R = _clip_scale_R(distance_R, own_R, limits.clip_radius)
    is_clipped_R, factor_R = scale_R < 1, move.alpha_R * scale_R
    _check_reach(own_R + factor_R * distance_R, state.params)
    mixed = [*_mixed("first", state.first, move.first, move.alpha_R)]
    mixed += _mixed("second", state.second, move.second, move.alpha_R)
    for name, p in state.params.items():
        # In two steps: a factor that undoes a huge difference may be too small for float32, its root is not.
        kept_R = 1 - is_clipped_R * _ROUNDING * torch.finfo(p.dtype).eps
        root = _per_row((factor_R * kept_R).sqrt(), p).to(p)
        p.addcmul_(move.delta[name].to(p) * root, root)
    for moment, new in mixed:
        moment.copy_(new)
    _count_up(state, move, with_moments=bool(mixed))
    return Applied(clipped_rows=int(is_clipped_R.sum()), divergence=_ratio(distance_R, own_R))


def _count_up(state: ReplicaState, move: Move, *, with_moments: bool) -> None:
    if with_moments:
        steps_R = move.steps_R.to(state.steps_R)
        state.steps_R.copy_(torch.maximum(state.steps_R, steps_R.clamp(max=state.steps_R + MAX_LEAD_STEPS)))
    state.version = max(state.version, min(move.version, state.version + MAX_LEAD_STEPS))


def _row_norms(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    norms = [_norm_of_rows(t.reshape(len(t), -1, t.shape[-1])).cpu() for t in tensors.values()]
    norm_R: torch.Tensor = torch.stack(norms).norm(dim=0)
    return norm_R


def _norm_of_rows(t: torch.Tensor) -> torch.Tensor:
    """Norms (float64) of the rows of [R, columns, last dimension], in the tensor's own type as far as that is safe."""
    t = t if knows_float64(t.device) else t.cpu()
    norm_RC: torch.Tensor = torch.linalg.vector_norm(t, dim=2)
    low, high = _SAFE_NORMS
    if not bool(((norm_RC == 0) | ((norm_RC > low) & (norm_RC < high))).all()):
        # Four times slower. The square of a large float32 is infinite, that of a small one zero.
        norm_RC = torch.linalg.vector_norm(t, dim=2, dtype=torch.float64)
    norm_R: torch.Tensor = torch.linalg.vector_norm(norm_RC, dim=1, dtype=torch.float64)
    return norm_R


def _clip_scale_R(distance_R: torch.Tensor, own_R: torch.Tensor, radius: float) -> torch.Tensor:  # noqa: N802 - suffix: result's shape
    """Factors (float64, at most 1) that shorten differences to `radius` times the norm of one's own row.

    A row's norm is over all its parameters. A row of zeros has no norm to measure by and stays where it is: factor 0.
    """
    allowed_R = radius * own_R
    return torch.where(distance_R > allowed_R, allowed_R / distance_R, 1.0)


def _ratio(distance_R: torch.Tensor, own_R: torch.Tensor) -> float:
    distance, norm = float(distance_R.norm()), float(own_R.norm())
    if distance <= norm * MAX_DIVERGENCE:
        return distance / norm if norm else 0.0
    return MAX_DIVERGENCE


def _check_reach(reach_R: torch.Tensor, params: dict[str, torch.Tensor]) -> None:
    """A row's norm bounds each of its values: no need to make new ones only to look whether they are finite."""
    for name, p in params.items():
        if not bool((reach_R <= torch.finfo(p.dtype).max).all()):
            raise InvalidInputError(f"average of params.{name}", "holds NaN or infinity")


def _mixed(
    group: str, own: dict[str, torch.Tensor], partner: dict[str, torch.Tensor], alpha_R: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for name, sent in partner.items():
        moment = own[name]
        new = moment.lerp(sent.to(moment), _per_row(alpha_R, moment).to(moment))
        _check_finite(f"average of {group}.{name}", new)
        yield moment, new


def _per_row(x_R: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x_R.view(-1, *[1] * (like.dim() - 1))


def _check_finite(field: str, t: torch.Tensor) -> None:
    # NaN and infinity end up in the extremes: several times quicker than isfinite.
    if t.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(t)):
        raise InvalidInputError(field, "holds NaN or infinity")


def _check_second(field: str, second: torch.Tensor, limit: float) -> None:
    low, high = (float(value) for value in torch.aminmax(second))
    if low < 0:
        raise InvalidInputError(field, f"an average of squares cannot be {low}")
    if high > limit:
        raise LimitExceededError(field, high, limit)


def _check_fits(state: ReplicaState, move: Move) -> None:
    """Shapes before values: everything after it broadcasts."""
    pairs = (
        ("params", state.params, move.delta),
        ("first", state.first, move.first),
        ("second", state.second, move.second),
    )
    without_moments = not (move.first or move.second)
    for group, own, partner in pairs[: 1 if without_moments else None]:
        if own.keys() != partner.keys():
            raise InvalidInputError(group, "the move has other names than the replica")
        for name, t in own.items():
            if t.shape != partner[name].shape:
                raise InvalidInputError(
                    f"{group}.{name}", f"has shape {tuple(partner[name].shape)}, must have {tuple(t.shape)}"
                )
    if move.alpha_R.shape != state.steps_R.shape or not bool(((move.alpha_R >= 0) & (move.alpha_R <= 1)).all()):
        raise InvalidInputError("alpha", "must be from 0 to 1 for each row")
    if move.steps_R.shape != state.steps_R.shape or bool((move.steps_R < 0).any()):
        raise InvalidInputError("steps", "must be 0 or more for each row")
    if move.version < 0:
        raise InvalidInputError("version", f"must be 0 or more, is {move.version}")
