"""Late gradients: how old they are, and what a step of theirs may do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from node.host.serving.batch_runner import RecentMean, is_stale, rate_scale, staleness_of
from node.model.experts.block import new_block
from node.model.experts.layer import layer_backward
from protocol.manifest import AveragingConfig, BlockId
from tests.support.runtime_jobs import TIMEOUT_S, backward, forward, make_runtime, step_alone
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.host.serving.jobs import BackwardJob, BackwardResult
    from node.host.serving.runtime import Runtime
    from node.model.experts.block import Block

LIMIT = 4
SCALE = small_manifest(dtype="fp64", averaging=AveragingConfig(max_staleness=LIMIT, stale_action="scale"))
REFUSE = small_manifest(dtype="fp64", averaging=AveragingConfig(max_staleness=LIMIT, stale_action="refuse"))
FIRST, SECOND = range(4), range(4, 8)
"""Experts of blocks 0 and 1 of a layer."""


@pytest.fixture
def scaling() -> Iterator[Runtime]:
    runtime = make_runtime(manifest=SCALE)
    yield runtime
    runtime.stop(TIMEOUT_S)


@pytest.fixture
def refusing() -> Iterator[Runtime]:
    runtime = make_runtime(manifest=REFUSE)
    yield runtime
    runtime.stop(TIMEOUT_S)


def set_versions(runtime: Runtime, *versions: int) -> None:
    """Of the first blocks of layer 0; before the runtime starts."""
    for block, version in zip(runtime.layer_blocks(0), versions, strict=False):
        block.version = version


def answers(runtime: Runtime, *jobs: BackwardJob) -> list[BackwardResult]:
    """Of jobs that wait together when the runtime starts."""
    for job in jobs:
        runtime.submit(job)
    runtime.start()
    return [job.future.result(TIMEOUT_S) for job in jobs]


def fresh_block(block: int = 0) -> Block:
    return new_block(SCALE, BlockId(0, block), CPU)


def assert_same_weights(block: Block, reference: Block) -> None:
    torch.testing.assert_close(block.params, reference.params, rtol=0, atol=1e-15)


def test_staleness_counts_the_steps_between_and_never_below_none() -> None:
    assert staleness_of(10, 3) == 7
    assert staleness_of(3, 10) == 0


@pytest.mark.parametrize(("staleness", "scale"), [(0, 1.0), (4, 1.0), (5, 0.8), (8, 0.5), (400, 0.01)])
def test_the_rate_falls_with_one_over_the_staleness_beyond_the_limit(staleness: int, scale: float) -> None:
    assert rate_scale(SCALE.averaging, staleness) == pytest.approx(scale)


def test_beyond_the_limit_a_run_may_refuse_instead() -> None:
    assert rate_scale(REFUSE.averaging, LIMIT) == 1.0
    assert rate_scale(REFUSE.averaging, LIMIT + 1) is None


@pytest.mark.parametrize("action", ["scale", "refuse"])
def test_a_limit_of_0_is_none(action: str) -> None:
    averaging = AveragingConfig(max_staleness=0, stale_action=action)  # type: ignore[arg-type]
    assert not is_stale(averaging, 10**9)
    assert rate_scale(averaging, 10**9) == 1.0


def test_a_forward_tells_the_highest_version_of_the_blocks_it_touched(scaling: Runtime) -> None:
    set_versions(scaling, 3, 7, 50)
    job = forward(1, experts=range(8))
    scaling.submit(job)
    scaling.start()
    assert job.future.result(TIMEOUT_S).version == 7


def test_forwards_merged_into_one_batch_are_told_the_versions_of_their_own_blocks(scaling: Runtime) -> None:
    set_versions(scaling, 3, 7)
    jobs = [forward(1, experts=FIRST), forward(2, experts=SECOND)]
    for job in jobs:
        scaling.submit(job)
    scaling.start()
    assert [job.future.result(TIMEOUT_S).version for job in jobs] == [3, 7]


def test_staleness_is_the_steps_of_the_touched_blocks_since_the_forward(scaling: Runtime) -> None:
    set_versions(scaling, 3, 7, 50)
    assert [result.staleness for result in answers(scaling, backward(1, resend=True, version=5, experts=FIRST))] == [0]
    result = backward(2, resend=True, version=5, experts=range(8))
    scaling.submit(result)
    assert result.future.result(TIMEOUT_S).staleness == 2


def test_kept_inputs_remember_which_blocks_they_touch(scaling: Runtime) -> None:
    set_versions(scaling, 3, 7, 50)
    asked = forward(1, experts=SECOND)
    scaling.submit(asked)
    scaling.start()
    late = backward(1, version=asked.future.result(TIMEOUT_S).version)
    scaling.call(lambda: set_versions(scaling, 3, 9, 50)).result(TIMEOUT_S)
    scaling.submit(late)
    assert late.future.result(TIMEOUT_S).staleness == 2


def test_a_late_gradient_steps_with_the_rate_scaled(scaling: Runtime) -> None:
    set_versions(scaling, 2 * LIMIT)
    late = backward(1, resend=True, experts=FIRST)
    (result,) = answers(scaling, late)
    reference, unscaled = fresh_block(), fresh_block()
    step_alone(reference, late, SCALE, rate_scale=0.5)
    step_alone(unscaled, late, SCALE)
    assert result.stepped
    assert result.staleness == 2 * LIMIT
    assert_same_weights(scaling.layer_blocks(0)[0], reference)
    assert not torch.allclose(reference.params["w_in"], unscaled.params["w_in"], rtol=0, atol=1e-6)
    assert scaling.steps_refused == 0


def test_whoever_does_not_say_their_version_is_as_stale_as_can_be(refusing: Runtime) -> None:
    set_versions(refusing, 1000)
    (result,) = answers(refusing, backward(1, resend=True, experts=FIRST))
    assert (result.staleness, result.stepped) == (1000, False)


def test_a_late_gradient_may_be_refused_and_still_gets_its_own_gradients(refusing: Runtime) -> None:
    set_versions(refusing, LIMIT + 1)
    late = backward(1, resend=True, experts=FIRST)
    (result,) = answers(refusing, late)
    block, untouched = refusing.layer_blocks(0)[0], fresh_block()
    assert not result.stepped
    assert block.version == LIMIT + 1
    assert all(torch.equal(block.params[name], p) for name, p in untouched.params.items())
    assert late.inputs
    alone = layer_backward([untouched], late.inputs.x_TD, late.inputs.pairs, late.grad_TD, lambda *_: None)
    torch.testing.assert_close(result.tokens_TD, alone.tokens_TD, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.weight_P, alone.weight_P, rtol=0, atol=1e-12)
    assert refusing.steps_refused == 1


def test_a_refused_gradient_is_no_part_of_the_step_of_those_it_waits_with(refusing: Runtime) -> None:
    set_versions(refusing, 2 * LIMIT)
    late = backward(1, resend=True, experts=FIRST)
    timely = backward(2, resend=True, version=2 * LIMIT, experts=FIRST)
    refused, stepped = answers(refusing, late, timely)
    reference = fresh_block()
    step_alone(reference, timely, REFUSE)
    assert (refused.stepped, stepped.stepped) == (False, True)
    assert_same_weights(refusing.layer_blocks(0)[0], reference)
    assert refusing.layer_blocks(0)[0].version == 2 * LIMIT + 1


def test_late_gradients_that_wait_together_are_each_scaled_by_their_own_age(scaling: Runtime) -> None:
    set_versions(scaling, 2 * LIMIT)
    timely = backward(1, resend=True, version=2 * LIMIT, experts=FIRST)
    late, later = backward(2, resend=True, version=2, experts=FIRST), backward(3, resend=True, experts=FIRST)
    results = answers(scaling, timely, late, later)
    # Those before it in the queue have stepped by then, and each of their steps makes a gradient one older.
    assert [result.staleness for result in results] == [0, 7, 10]
    reference = fresh_block()
    for job, scale in ((timely, 1.0), (late, LIMIT / 7), (later, LIMIT / 10)):
        step_alone(reference, job, SCALE, scale)
    assert_same_weights(scaling.layer_blocks(0)[0], reference)


def test_gradients_that_are_in_time_still_share_one_step(scaling: Runtime) -> None:
    set_versions(scaling, LIMIT)
    results = answers(scaling, *(backward(n, resend=True, version=n, experts=FIRST) for n in range(3)))
    assert [result.staleness for result in results] == [4, 3, 2]
    assert scaling.layer_blocks(0)[0].version == LIMIT + 1


def test_a_retry_of_a_refused_gradient_is_refused_again(refusing: Runtime) -> None:
    set_versions(refusing, LIMIT + 1)
    first, retry = backward(1, resend=True, experts=FIRST), backward(1, resend=True, experts=FIRST)
    assert [result.stepped for result in answers(refusing, first, retry)] == [False, False]
    assert refusing.steps_refused == 2


def test_a_request_for_gradients_only_steps_nothing_now_and_leaves_the_step_to_a_later_one(scaling: Runtime) -> None:
    quiet = backward(1, resend=True, no_step=True, experts=FIRST)
    (result,) = answers(scaling, quiet)
    untouched = fresh_block()
    assert not result.stepped
    assert all(torch.equal(scaling.layer_blocks(0)[0].params[name], p) for name, p in untouched.params.items())
    assert scaling.layer_blocks(0)[0].learnt_E.sum() == 0
    asked = backward(1, resend=True, experts=FIRST)
    scaling.submit(asked)
    assert asked.future.result(TIMEOUT_S).stepped


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_request_for_gradients_only_is_no_part_of_the_step_it_waits_with(
    scaling: Runtime, order: tuple[int, int]
) -> None:
    jobs = {
        1: backward(1, resend=True, no_step=True, experts=FIRST),
        2: backward(2, resend=True, experts=FIRST),
    }
    results = dict(zip(order, answers(scaling, *(jobs[n] for n in order)), strict=True))
    reference = fresh_block()
    step_alone(reference, jobs[2], SCALE)
    assert (results[1].stepped, results[2].stepped) == (False, True)
    assert_same_weights(scaling.layer_blocks(0)[0], reference)


def test_gradients_only_however_late_count_neither_as_refused_nor_in_the_mean(refusing: Runtime) -> None:
    set_versions(refusing, 100)
    (result,) = answers(refusing, backward(1, resend=True, no_step=True, experts=FIRST))
    assert result.staleness == 100
    assert refusing.steps_refused == 0
    assert refusing.staleness == 0.0


def test_the_runtime_tells_the_recent_mean_staleness(scaling: Runtime) -> None:
    set_versions(scaling, 4)
    answers(scaling, *(backward(n, resend=True, version=v, experts=FIRST) for n, v in enumerate((4, 2, 0))))
    assert scaling.staleness == pytest.approx(2.0)


def test_what_changes_the_versions_between_batches_decides_what_the_next_batch_merges(refusing: Runtime) -> None:
    # As an exchange does that moves a block ahead while gradients wait for it.
    late = backward(1, resend=True, experts=FIRST)
    timely = backward(2, resend=True, version=LIMIT + 1, experts=FIRST)
    refusing.call(lambda: set_versions(refusing, LIMIT + 1))
    results = answers(refusing, timely, late)
    assert [(result.staleness, result.stepped) for result in results] == [(0, True), (LIMIT + 2, False)]


def test_a_recent_mean_is_the_plain_mean_at_first_and_forgets_later() -> None:
    mean = RecentMean()
    for value in (1, 2, 3):
        mean.add(value)
    assert mean.value == pytest.approx(2.0)
    for _ in range(2000):
        mean.add(10)
    assert mean.value == pytest.approx(10.0, abs=1e-3)
