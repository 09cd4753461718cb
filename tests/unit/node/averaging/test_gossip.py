"""Gossip's arithmetic: where replicas end, what keeps them together, and how far a hostile partner can push one.

Shapes: R rows of a replica; every replica here has R = 2 and two parameters, one of them without moments.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInputError
from node.averaging import gossip
from node.averaging.gossip import (
    MAX_LEAD_STEPS,
    GossipLimits,
    Move,
    apply_move,
    checked_moments,
    first_bound,
    relative_distance,
    share_R,
)
from node.model.experts.adam import AdamState, adam_step, clip_per_expert
from node.model.replica_state import ReplicaState
from protocol.announcements import MAX_DIVERGENCE
from protocol.limits import MAX_RUN_TOKENS
from protocol.manifest import OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

R = 2
SHAPES = {"weights": (R, 2, 2), "biases": (R, 3)}
WITH_MOMENTS = ("weights",)
ADAM = OptimizerConfig()
FREE = GossipLimits(clip_radius=1e9, max_second=1e9, first_bound=1e9)
STRICT = GossipLimits(clip_radius=0.5, max_second=1.0, first_bound=first_bound(ADAM.beta1, ADAM.beta2))
EPS = torch.finfo(torch.float32).eps

seeds = st.integers(0, 1 << 32)
work = st.lists(st.integers(0, 1 << 40), min_size=R, max_size=R)
float32s = st.floats(allow_nan=False, allow_infinity=False, width=32)


def random_replica(seed: int, dtype: torch.dtype = torch.float64) -> ReplicaState:
    generator = torch.Generator().manual_seed(seed)
    params = {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in SHAPES.items()}
    return ReplicaState(
        params=params,
        first={n: torch.randn(SHAPES[n], generator=generator, dtype=dtype) / 100 for n in WITH_MOMENTS},
        second={n: torch.rand(SHAPES[n], generator=generator, dtype=dtype) / 10 for n in WITH_MOMENTS},
        steps_R=torch.randint(0, 100, (R,), generator=generator),
        learnt_R=torch.zeros(R, dtype=torch.float64),
        version=seed % 100,
    )


def move_towards(partner: ReplicaState, delta: dict[str, torch.Tensor], alpha_R: torch.Tensor) -> Move:
    return Move(
        delta=delta,
        alpha_R=alpha_R,
        first=partner.first,
        second=partner.second,
        steps_R=partner.steps_R,
        version=partner.version,
    )


def exchange(
    a: ReplicaState, b: ReplicaState, work_a: Sequence[float], work_b: Sequence[float], limits: GossipLimits = FREE
) -> None:
    """Both sides of an exchange, with the difference as both know it."""
    was_a, was_b = a.copy(), b.copy()
    delta = {n: was_b.params[n] - was_a.params[n] for n in SHAPES}
    work_a_R, work_b_R = torch.tensor(work_a, dtype=torch.float64), torch.tensor(work_b, dtype=torch.float64)
    apply_move(a, move_towards(was_b, delta, share_R(work_a_R, work_b_R)), limits)
    apply_move(b, move_towards(was_a, {n: -d for n, d in delta.items()}, share_R(work_b_R, work_a_R)), limits)


def rows(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[R, everything of a row]."""
    return torch.cat([t.reshape(R, -1) for t in tensors.values()], dim=1).double()


def diameters(group: list[ReplicaState]) -> torch.Tensor:
    """Largest distance between two replicas, row by row."""
    pairs = [(rows(a.params) - rows(b.params)).norm(dim=1) for a, b in combinations(group, 2)]
    return torch.stack(pairs).amax(dim=0)


def everything(state: ReplicaState) -> list[Any]:
    return [t.tolist() for t in state.named().values()] + [state.steps_R.tolist(), state.version]


@settings(deadline=None)
@given(work, work)
def test_the_shares_of_both_sides_add_up_to_one(work_a: list[int], work_b: list[int]) -> None:
    a_R, b_R = torch.tensor(work_a, dtype=torch.float64), torch.tensor(work_b, dtype=torch.float64)
    torch.testing.assert_close(share_R(a_R, b_R) + share_R(b_R, a_R), torch.ones(R, dtype=torch.float64))


def test_who_learnt_more_moves_less_and_two_idle_ones_meet_in_the_middle() -> None:
    work_R = torch.tensor([30.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    partner_R = torch.tensor([10.0, 7.0, 0.0, 5.0], dtype=torch.float64)
    assert share_R(work_R, partner_R).tolist() == [0.25, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("forged", [-1.0, math.nan, math.inf, 2.0 * MAX_RUN_TOKENS])
def test_work_that_is_no_count_of_tokens_is_refused(forged: float) -> None:
    work_R = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(InvalidInputError, match="work"):
        share_R(work_R, torch.tensor([1.0, forged], dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="shape"):
        share_R(work_R, work_R[:1])


@settings(deadline=None)
@given(seeds, seeds, work, work)
def test_both_sides_end_at_the_same_point_whatever_their_work(
    seed_a: int, seed_b: int, work_a: list[int], work_b: list[int]
) -> None:
    a, b = random_replica(seed_a), random_replica(seed_b)
    steps_R = torch.maximum(a.steps_R, b.steps_R)
    exchange(a, b, work_a, work_b)
    for name, t in a.named().items():
        torch.testing.assert_close(t, b.named()[name], rtol=1e-12, atol=1e-12)
    assert a.version == b.version == max(seed_a % 100, seed_b % 100)
    assert a.steps_R.tolist() == b.steps_R.tolist() == steps_R.tolist()


@settings(deadline=None)
@given(seeds, seeds, st.lists(st.integers(0, 1 << 40), min_size=R, max_size=R))
def test_equal_work_preserves_the_mean(seed_a: int, seed_b: int, both_work: list[int]) -> None:
    a, b = random_replica(seed_a), random_replica(seed_b)
    mean = {n: (t + b.named()[n]) / 2 for n, t in a.named().items()}
    exchange(a, b, both_work, both_work)
    for state in (a, b):
        for name, t in state.named().items():
            torch.testing.assert_close(t, mean[name], rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(
    st.lists(seeds, min_size=2, max_size=5, unique=True),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), work, work), max_size=8),
    st.floats(0.01, 10),
)
def test_divergence_never_grows_with_any_work_clipped_or_not(
    group_seeds: list[int], exchanges: list[tuple[int, int, list[int], list[int]]], radius: float
) -> None:
    group = [random_replica(seed) for seed in group_seeds]
    limits = replace(FREE, clip_radius=radius)
    for i, j, work_a, work_b in exchanges:
        a, b = group[i % len(group)], group[j % len(group)]
        if a is not b:
            before_R = diameters(group)
            exchange(a, b, work_a, work_b, limits)
            assert bool((diameters(group) <= before_R * (1 + 1e-12)).all())


@settings(max_examples=8, deadline=None)
@given(
    seeds,
    st.sampled_from([[(0, 1), (1, 2), (2, 3)], [(0, 1), (0, 2), (0, 3)], list(combinations(range(4), 2))]),
    st.floats(0.2, 10),
)
def test_any_order_of_connected_pairs_converges(seed: int, pairs: list[tuple[int, int]], radius: float) -> None:
    order = random.Random(seed)
    group = [random_replica(seed + i) for i in range(4)]
    limits = replace(FREE, clip_radius=radius)
    before_R = diameters(group)
    for _ in range(40):
        for i, j in order.sample(pairs, len(pairs)):
            work_a, work_b = ([order.uniform(1, 3) for _ in range(R)] for _ in range(2))
            exchange(group[i], group[j], work_a, work_b, limits)
    assert bool((diameters(group) < 1e-3 * before_R).all())


@settings(deadline=None)
@given(seeds, seeds, work, work)
def test_training_between_snapshot_and_move_is_kept(
    seed: int, partner_seed: int, work_own: list[int], work_partner: list[int]
) -> None:
    idle, partner = random_replica(seed), random_replica(partner_seed)
    trained = idle.copy()
    delta = {n: partner.params[n] - idle.params[n] for n in SHAPES}
    learnt = {n: torch.full_like(t, 0.125) for n, t in trained.params.items()}
    for name, t in trained.params.items():
        t.add_(learnt[name])
    alpha_R = share_R(torch.tensor(work_own).double(), torch.tensor(work_partner).double())
    for state in (idle, trained):
        apply_move(state, move_towards(partner, delta, alpha_R), FREE)
    for name, t in trained.params.items():
        torch.testing.assert_close(t, idle.params[name] + learnt[name], rtol=1e-12, atol=1e-12)


def test_each_row_is_clipped_by_itself_and_counted() -> None:
    own, partner = random_replica(1), random_replica(2)
    was = own.copy()
    delta = {n: partner.params[n] - own.params[n] for n in SHAPES}
    for d in delta.values():
        d[0].mul_(0.01)
    allowed_R = STRICT.clip_radius * rows(own.params).norm(dim=1)
    assert rows(delta).norm(dim=1)[1] > allowed_R[1]
    assert apply_move(own, move_towards(partner, delta, torch.ones(R).double()), STRICT).clipped_rows == 1
    moved = rows(own.params) - rows(was.params)
    torch.testing.assert_close(moved[0], rows(delta)[0])
    torch.testing.assert_close(moved[1].norm(), allowed_R[1])
    torch.testing.assert_close(torch.cosine_similarity(moved[1], rows(delta)[1], dim=0), torch.tensor(1.0).double())


def test_a_huge_difference_is_shortened_to_the_radius_exactly() -> None:
    own = random_replica(1, torch.float32)
    for p in own.params.values():
        p.mul_(1e-4)
    was = own.copy()
    delta = {n: torch.full(shape, 3e38) for n, shape in SHAPES.items()}
    assert apply_move(own, move_towards(was, delta, torch.ones(R).double()), STRICT).clipped_rows == R
    moved_R = (rows(own.params) - rows(was.params)).norm(dim=1)
    torch.testing.assert_close(moved_R, STRICT.clip_radius * rows(was.params).norm(dim=1), rtol=1e-5, atol=0)


def clip_scale_R(  # noqa: N802 - suffix: result's shape
    delta: Mapping[str, torch.Tensor], own_params: Mapping[str, torch.Tensor], radius: float
) -> torch.Tensor:
    """What a move's differences are shortened by."""
    return gossip._clip_scale_R(gossip._row_norms(delta), gossip._row_norms(own_params), radius)


def test_a_row_of_zeros_stays_and_an_equal_partner_is_not_clipped() -> None:
    zeros = {"w": torch.zeros(2, 3)}
    assert clip_scale_R({"w": torch.tensor([[1.0, 0, 0], [0, 0, 0]])}, zeros, 0.5).tolist() == [0.0, 1.0]


def trained_replica(seed: int, n_steps: int) -> ReplicaState:
    """A float32 replica as honest training leaves it: real steps on random, clipped gradients."""
    state = random_replica(seed, torch.float32)
    for moments in (state.first, state.second):
        for t in moments.values():
            t.zero_()
    state.steps_R.zero_()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        grads = {n: torch.randn(SHAPES[n], generator=generator) * 10 for n in WITH_MOMENTS}
        clip_per_expert(grads, math.sqrt(STRICT.max_second))
        step(state, grads, lr=1e-3)
    return state


def step(state: ReplicaState, grads: dict[str, torch.Tensor], lr: float) -> None:
    adam = AdamState(first=state.first, second=state.second, steps_E=state.steps_R)
    adam_step(state.params, adam, grads, torch.arange(R), lr, ADAM)


def hostile_tensor(data: st.DataObject, shape: tuple[int, ...], values: st.SearchStrategy[float]) -> torch.Tensor:
    n = math.prod(shape)
    return torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n))).view(shape)


@settings(deadline=None)
@given(st.data(), seeds, st.integers(0, 5), st.floats(0.01, 10))
def test_a_hostile_partner_moves_no_row_beyond_the_radius_and_arms_no_later_step(
    data: st.DataObject, seed: int, n_steps: int, radius: float
) -> None:
    own = trained_replica(seed, n_steps)
    limits = replace(STRICT, clip_radius=radius)
    was = own.copy()
    forged_work = hostile_tensor(data, (R,), st.floats(0, MAX_RUN_TOKENS)).double()
    move = Move(
        delta={n: hostile_tensor(data, shape, float32s) for n, shape in SHAPES.items()},
        alpha_R=share_R(torch.tensor([100.0, 0.0], dtype=torch.float64), forged_work),
        first={n: hostile_tensor(data, SHAPES[n], float32s) for n in WITH_MOMENTS},
        second={n: hostile_tensor(data, SHAPES[n], st.floats(0, 1, width=32)) for n in WITH_MOMENTS},
        steps_R=torch.tensor(data.draw(st.lists(st.integers(0, (1 << 63) - 1), min_size=R, max_size=R))),
        version=data.draw(st.integers(0, 1 << 64)),
    )
    checked_moments(move.first, move.second, limits)
    apply_move(own, move, limits)

    norm_R = rows(was.params).norm(dim=1)
    moved_R = (rows(own.params) - rows(was.params)).norm(dim=1)
    assert bool((moved_R <= norm_R * (radius + 10 * EPS)).all())
    for name in WITH_MOMENTS:
        assert bool((own.second[name] >= 0).all())
        bound = limits.first_bound * own.second[name].sqrt()
        assert bool((own.first[name].abs() <= bound * (1 + 100 * EPS) + 1e-20).all())
    assert was.version <= own.version <= was.version + MAX_LEAD_STEPS
    assert bool((own.steps_R >= was.steps_R).all())
    assert bool((own.steps_R <= was.steps_R + MAX_LEAD_STEPS).all())
    assert_the_next_step_is_short(own, limits)


def assert_the_next_step_is_short(own: ReplicaState, limits: GossipLimits) -> None:
    lr, was = 1e-2, own.copy()
    step(own, {n: torch.zeros(SHAPES[n]) for n in WITH_MOMENTS}, lr)
    count_R = own.steps_R.double()
    bound_R = lr * limits.first_bound * (1 - ADAM.beta2**count_R).sqrt() / (1 - ADAM.beta1**count_R)
    for name in WITH_MOMENTS:
        moved = (own.params[name] - was.params[name]).abs().double()
        rounding = EPS * was.params[name].abs()
        assert bool((moved <= bound_R.view(R, 1, 1) * 1.001 + rounding).all())


def test_forged_moments_without_the_check_would_break_that_bound() -> None:
    own = trained_replica(3, 5)
    was, forged = own.copy(), own.copy()
    for name in WITH_MOMENTS:
        forged.first[name].fill_(1.0)
        forged.second[name].fill_(1e-12)
    delta = {n: torch.zeros_like(t) for n, t in own.params.items()}
    move = move_towards(forged, delta, torch.ones(R, dtype=torch.float64))
    apply_move(own, move, STRICT)
    with pytest.raises(AssertionError):
        assert_the_next_step_is_short(own, STRICT)
    checked_moments(move.first, move.second, STRICT)
    apply_move(was, move, STRICT)
    assert_the_next_step_is_short(was, STRICT)


@pytest.mark.parametrize("forged", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", ["delta", "first", "second"])
def test_a_move_with_an_outcome_that_is_not_finite_changes_nothing(group: str, forged: float) -> None:
    own, partner = random_replica(1), random_replica(2)
    was = everything(own)
    delta = {n: partner.params[n] - own.params[n] for n in SHAPES}
    move = move_towards(partner, delta, torch.full((R,), 0.5, dtype=torch.float64))
    getattr(move, group)["weights"].view(-1)[-1] = forged
    with pytest.raises(InvalidInputError, match=r"average of .*weights: holds NaN or infinity"):
        apply_move(own, move, FREE)
    assert everything(own) == was


def bad_moves() -> dict[str, Any]:
    half_R = torch.full((R,), 0.5, dtype=torch.float64)
    return {
        "a parameter less": {"delta": {"weights": torch.zeros(SHAPES["weights"])}},
        "a parameter of another shape": {"delta": {n: torch.zeros(1, *shape[1:]) for n, shape in SHAPES.items()}},
        "moments that this replica has not": {"first": {n: torch.zeros(shape) for n, shape in SHAPES.items()}},
        "moments of another shape": {"second": {"weights": torch.zeros(R, 1, 1)}},
        "no second moments": {"second": {}},
        "a share over one": {"alpha_R": half_R * 3},
        "a share below zero": {"alpha_R": -half_R},
        "a share that is not a number": {"alpha_R": half_R * math.nan},
        "a share for one row only": {"alpha_R": half_R[:1]},
        "negative steps": {"steps_R": torch.tensor([-1, 0])},
        "steps of one row only": {"steps_R": torch.tensor([1])},
        "a negative version": {"version": -1},
    }


@pytest.mark.parametrize("case", bad_moves())
def test_a_move_that_does_not_fit_changes_nothing(case: str) -> None:
    own, partner = random_replica(1), random_replica(2)
    was = everything(own)
    delta = {n: partner.params[n] - own.params[n] for n in SHAPES}
    move = replace(move_towards(partner, delta, torch.full((R,), 0.5).double()), **bad_moves()[case])
    with pytest.raises(InvalidInputError):
        apply_move(own, move, FREE)
    assert everything(own) == was


def test_a_move_without_moments_leaves_moments_and_their_steps() -> None:
    own, partner = random_replica(1), random_replica(2)
    was = own.copy()
    partner.steps_R += 5
    delta = {n: partner.params[n] - own.params[n] for n in SHAPES}
    move = replace(move_towards(partner, delta, torch.ones(R).double()), first={}, second={})
    apply_move(own, move, FREE)
    for name, p in own.params.items():
        torch.testing.assert_close(p, partner.params[name])
    assert torch.equal(own.steps_R, was.steps_R)
    for name in WITH_MOMENTS:
        assert torch.equal(own.first[name], was.first[name])
        assert torch.equal(own.second[name], was.second[name])


def test_a_trunk_parameter_that_wants_gradients_is_moved_in_place() -> None:
    own, partner = random_replica(1), random_replica(2)
    live = torch.nn.Parameter(own.params["weights"])
    own.params["weights"] = live
    delta = {n: (partner.params[n] - own.params[n]).detach() for n in SHAPES}
    apply_move(own, move_towards(partner, delta, torch.ones(R).double()), FREE)
    assert own.params["weights"] is live
    torch.testing.assert_close(live.detach(), partner.params["weights"])


def test_distance_is_relative_and_always_a_number_that_can_be_announced() -> None:
    own = {"a": torch.full((1, 4), 2.0), "b": torch.full((1, 5), 0.0)}
    assert relative_distance({"a": torch.full((1, 4), 1.0), "b": own["b"]}, own) == 0.5
    assert relative_distance({"a": own["b"], "b": own["b"]}, {"b": own["b"]}) == 0.0
    assert relative_distance(own, {"b": own["b"]}) == MAX_DIVERGENCE
    assert relative_distance({"a": torch.full((1, 4), 3e38), "b": own["b"]}, own) == MAX_DIVERGENCE
    assert relative_distance({"a": torch.full((1, 4), math.nan), "b": own["b"]}, own) == MAX_DIVERGENCE
