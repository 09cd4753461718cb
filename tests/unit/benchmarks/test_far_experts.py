"""The virtual clock, and experts that are far away on it."""

from __future__ import annotations

import random

import pytest
import torch

from node.model.gate import build_gate
from node.model.moe import LocalExperts, MoE
from tests.benchmarks.far_experts import Distance, FarExperts, Fate
from tests.support.swarm_parts import small_manifest
from tests.support.virtual_clock import VirtualClock

EXACT = small_manifest(dtype="fp64", codec="fp64")


def test_the_clock_jumps_to_whoever_waits_for_the_earliest_time() -> None:
    clock, told = VirtualClock(), list[tuple[float, str]]()

    def work(item: tuple[str, float]) -> str:
        name, step_s = item
        for _ in range(3):
            clock.sleep_until(clock.now_s + step_s)
            told.append((clock.now_s, name))
        return name

    assert clock.run(work, [("slow", 5.0), ("quick", 2.0)]) == ["slow", "quick"]
    assert told == [(2, "quick"), (4, "quick"), (5, "slow"), (6, "quick"), (10, "slow"), (15, "slow")]


def test_functions_begin_one_after_the_other_and_a_second_run_goes_on_where_the_first_ended() -> None:
    clock = VirtualClock()
    assert clock.run(lambda _: clock.now_s, range(3), every_s=0.5) == [0.0, 0.5, 1.0]
    assert clock.run(lambda _: clock.now_s, range(2), every_s=0.5) == [1.0, 1.5]


def test_an_error_of_one_function_is_raised_once_the_others_have_ended() -> None:
    clock, ended = VirtualClock(), list[int]()

    def work(number: int) -> None:
        if not number:
            raise ValueError("the first")
        clock.sleep_until(3.0)
        ended.append(number)

    with pytest.raises(ValueError, match="the first"):
        clock.run(work, range(3))
    assert ended == [1, 2]


@pytest.mark.parametrize("fail", [0.0, 0.1, 0.5, 1.0])
def test_a_call_is_lost_for_good_only_if_its_repeat_is_lost_too(fail: float) -> None:
    rng = random.Random(0)
    fates = [Fate.drawn(rng, 1.0, fail) for _ in range(4000)]
    lost = sum(fate.answered_s is None for fate in fates) / len(fates)
    assert lost == pytest.approx(fail**2, abs=0.02)
    never = sum(fate.executed_s is None for fate in fates) / len(fates)
    assert never == pytest.approx((fail / 2) ** 2, abs=0.02)
    for fate in fates:
        if fate.answered_s is not None:
            assert fate.executed_s is not None
            assert fate.executed_s <= fate.answered_s == fate.ended_s
    mean_s = sum(fate.ended_s for fate in fates) / len(fates)
    second_s = (1 - fail) + fail / 2
    assert mean_s == pytest.approx((1 - fail) + fail * (1 / 2 + second_s), rel=0.1)


def passes(experts: LocalExperts | FarExperts, clock: VirtualClock, n: int) -> list[torch.Tensor]:
    """Outputs and gradients of `n` micro-batches, all begun at once."""
    layer = MoE(build_gate(EXACT.model, torch.Generator().manual_seed(1)), experts, 0).double()

    def one(index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        x_TD = torch.randn(10, EXACT.model.d_model, dtype=torch.float64, generator=generator).requires_grad_()
        y_TD: torch.Tensor = layer(x_TD)
        (grad_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD)
        return torch.stack([y_TD.detach(), grad_TD])

    return clock.run(one, range(n))


def test_far_experts_that_answer_do_what_near_ones_do() -> None:
    clock = VirtualClock()
    far = FarExperts(EXACT, Distance(delay_mean_s=0.3, fail=0.0), clock)
    near = LocalExperts(EXACT)
    for _ in range(3):
        (ours,), (wanted,) = passes(far, clock, 1), passes(near, VirtualClock(), 1)
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    assert clock.now_s > 0
    for ours_block, block in zip(far.local.blocks[0], near.blocks[0], strict=True):
        torch.testing.assert_close(ours_block.params, block.params, rtol=1e-10, atol=1e-10)


def test_delays_change_what_experts_have_learnt_when_a_call_comes_and_a_seed_repeats_it() -> None:
    results = []
    for delay_mean_s in (0.0, 1.0, 1.0):
        clock = VirtualClock()
        far = FarExperts(EXACT, Distance(delay_mean_s=delay_mean_s, fail=0.0), clock)
        results.append(torch.stack(passes(far, clock, 6)))
    at_once, late, same = results
    assert torch.equal(late, same)
    assert not torch.allclose(at_once, late)


def test_where_every_call_is_lost_nothing_answers_and_every_gradient_is_zero() -> None:
    clock = VirtualClock()
    far = FarExperts(EXACT, Distance(delay_mean_s=0.1, fail=1.0), clock)
    (lost,) = passes(far, clock, 1)
    assert not bool(lost.any())
    far.is_near = True
    (near,) = passes(far, clock, 1)
    assert bool(near.any())
