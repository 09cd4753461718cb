"""What is believed of a partner's moments, and where the limits come from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError
from node.averaging.gossip import GossipLimits, checked_moments, first_bound
from protocol.manifest import TRUNK, AveragingConfig, BlockId
from tests.support.swarm_parts import small_manifest

STRICT = GossipLimits(clip_radius=0.5, max_second=1.0, first_bound=first_bound(0.9, 0.95))


@settings(deadline=None)
@given(
    st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.95, 0.95), (0.0, 0.99), (0.5, 0.3)]),
    st.lists(st.floats(-1, 1), min_size=1, max_size=60),
)
def test_honest_moments_pass_the_check_unchanged(betas: tuple[float, float], gradients: list[float]) -> None:
    limits = replace(STRICT, first_bound=first_bound(*betas))
    first, second = adam_averages(betas, gradients)
    was = first.clone()
    checked_moments({"w": first}, {"w": second}, limits)
    torch.testing.assert_close(first, was, rtol=1e-9, atol=1e-150)


def test_the_bound_on_first_moments_is_reached_by_the_worst_gradients() -> None:
    betas = (0.9, 0.95)
    ratio = betas[0] / betas[1]
    first, second = adam_averages(betas, [ratio ** (199 - i) for i in range(200)])
    assert float(first / second.sqrt()) == pytest.approx(first_bound(*betas), rel=1e-6)


def adam_averages(betas: tuple[float, float], gradients: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    first = second = 0.0
    for gradient in gradients:
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
    return torch.tensor([[first]], dtype=torch.float64), torch.tensor([[second]], dtype=torch.float64)


def test_where_adam_has_no_bound_of_its_own_a_steady_and_a_single_gradient_still_pass() -> None:
    for betas in ((0.9, 0.5), (0.9, 0.81), (0.9, 0.0), (0.0, 0.0)):
        bound = first_bound(*betas)
        assert math.isfinite(bound)
        assert bound >= 1
        assert bound >= (1 - betas[0]) / math.sqrt(1 - betas[1])


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        ([math.nan, 0.0], [0.1, 0.1], InvalidInputError),
        ([math.inf, 0.0], [0.1, 0.1], InvalidInputError),
        ([0.0, 0.0], [math.nan, 0.1], InvalidInputError),
        ([0.0, 0.0], [math.inf, 0.1], InvalidInputError),
        ([0.0, 0.0], [-1e-30, 0.1], InvalidInputError),
        ([0.0, 0.0], [0.1, 1.02], LimitExceededError),
        ([0.0, 0.0], [0.1], InvalidInputError),
    ],
)
def test_impossible_moments_are_refused(first: list[float], second: list[float], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(first|second)\.w"):
        checked_moments({"w": torch.tensor([first])}, {"w": torch.tensor([second])}, STRICT)
    with pytest.raises(InvalidInputError, match="other names"):
        checked_moments({"w": torch.zeros(1, 2)}, {}, STRICT)


def test_a_first_moment_without_a_second_is_cut_to_nothing() -> None:
    first = torch.tensor([[5.0, -5.0, 0.1]])
    checked_moments({"w": first}, {"w": torch.tensor([[0.0, 1.0, 1.0]])}, STRICT)
    torch.testing.assert_close(first, torch.tensor([[0.0, -STRICT.first_bound, 0.1]]))


def test_limits_come_from_the_manifest_for_experts_and_trunk_alike() -> None:
    manifest = small_manifest(
        averaging=AveragingConfig(clip_radius=0.25), optimizer={"grad_clip": 3.0, "expert_grad_clip": 2.0}
    )
    experts = GossipLimits.from_manifest(manifest, BlockId(0, 0))
    trunk = GossipLimits.from_manifest(manifest, TRUNK)
    assert (experts.clip_radius, experts.max_second) == (0.25, 4.0)
    assert (trunk.clip_radius, trunk.max_second) == (0.25, 9.0)
    assert experts.first_bound == trunk.first_bound == first_bound(0.9, 0.95)
