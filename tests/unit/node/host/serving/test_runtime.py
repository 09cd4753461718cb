from __future__ import annotations

import dataclasses
from concurrent.futures import wait
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import (
    DeadlineError,
    DrainingError,
    InvalidInputError,
    KilohiveError,
    NoRoomError,
    NotHostedError,
    OverloadedError,
    UnknownRequestError,
)
from node.host.serving import batch_runner as worker_module
from node.host.serving.activation_cache import ActivationCache, SteppedIds
from node.host.serving.jobs import BackwardJob
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.model.experts.block import new_block
from node.model.experts.layer import layer_backward, layer_forward
from protocol.manifest import BlockId
from tests.support.runtime_jobs import (
    MANIFEST,
    NEVER,
    TIMEOUT_S,
    Held,
    backward,
    forward,
    inputs,
    key,
    make_runtime,
    step_alone,
)
from tests.support.swarm_parts import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator


NEVER_S = 1000.0


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    running = make_runtime()
    running.start()
    yield running
    running.stop(TIMEOUT_S)


def versions(runtime: Runtime) -> int:
    return sum(block.version for block in runtime.blocks.values())


def test_while_it_rests_a_runtime_runs_calls_and_no_batch() -> None:
    rests_s = [NEVER_S]
    resting = Runtime([new_block(MANIFEST, BlockId(0, 0), CPU)], MANIFEST, RuntimeConfig(), rest_s=lambda: rests_s[-1])
    resting.start()
    try:
        job = forward(0, experts=range(4))
        resting.submit(job)
        assert resting.call(lambda: len(resting.blocks)).result(TIMEOUT_S) == 1
        assert not job.future.done()
        rests_s.append(0.0)
        resting.call(lambda: None).result(TIMEOUT_S)
        assert len(job.future.result(TIMEOUT_S).combined_TD)
    finally:
        resting.stop(TIMEOUT_S)


def test_a_runtime_that_stops_finishes_what_waits_without_a_rest() -> None:
    resting = Runtime([new_block(MANIFEST, BlockId(0, 0), CPU)], MANIFEST, RuntimeConfig(), rest_s=lambda: NEVER_S)
    resting.start()
    job = forward(0, experts=range(4))
    resting.submit(job)
    resting.stop(TIMEOUT_S)
    assert job.future.done()


def test_a_batch_that_finds_no_memory_is_told_and_counted_and_the_next_one_runs(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(worker_module, "layer_forward", full)
        job = forward(0)
        runtime.submit(job)
        with pytest.raises(NoRoomError, match="no memory for the batch"):
            job.future.result(TIMEOUT_S)
    assert runtime.out_of_memory == 1
    again = forward(1)
    runtime.submit(again)
    assert len(again.future.result(TIMEOUT_S).combined_TD)


def test_inputs_that_are_forgotten_are_asked_for_again(runtime: Runtime) -> None:
    job = forward(0)
    runtime.submit(job)
    job.future.result(TIMEOUT_S)
    assert runtime.kept_bytes > 0
    runtime.forget_inputs().result(TIMEOUT_S)
    assert runtime.kept_bytes == 0
    late = backward(0)
    runtime.submit(late)
    with pytest.raises(UnknownRequestError):
        late.future.result(TIMEOUT_S)


def test_requests_merged_into_one_batch_get_what_each_would_get_alone(runtime: Runtime) -> None:
    held = Held(runtime)
    jobs = [forward(n) for n in range(3)]
    for job in jobs:
        runtime.submit(job)
    held.release()
    blocks = runtime.layer_blocks(0)
    for job in jobs:
        alone_TD = layer_forward(blocks, job.inputs.x_TD, job.inputs.pairs)
        torch.testing.assert_close(job.future.result(TIMEOUT_S).combined_TD, alone_TD, rtol=0, atol=1e-12)


def test_a_merged_backward_steps_once_on_the_sum_and_answers_each_its_own(runtime: Runtime) -> None:
    for n in range(2):
        runtime.submit(forward(n))
    reference = make_runtime()
    held = Held(runtime)
    jobs = [backward(n) for n in range(2)]
    for job in jobs:
        runtime.submit(job)
    held.release()
    for n, job in enumerate(jobs):
        result = job.future.result(TIMEOUT_S)
        part = inputs(n)
        alone = layer_backward(reference.layer_blocks(0), part.x_TD, part.pairs, job.grad_TD, lambda *_: None)
        torch.testing.assert_close(result.tokens_TD, alone.tokens_TD, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.weight_P, alone.weight_P, rtol=0, atol=1e-12)
        assert result.stepped
    assert max(block.version for block in runtime.blocks.values()) == 1


def test_a_retry_after_the_step_gets_gradients_but_steps_nothing(runtime: Runtime) -> None:
    runtime.submit(forward(1))
    first, retry = backward(1), backward(1, resend=True)
    runtime.submit(first)
    assert first.future.result(TIMEOUT_S).stepped
    before = versions(runtime)
    weights = {block_id: block.params["w_in"].clone() for block_id, block in runtime.blocks.items()}
    runtime.submit(retry)
    assert not retry.future.result(TIMEOUT_S).stepped
    assert versions(runtime) == before
    assert all(torch.equal(block.params["w_in"], weights[block_id]) for block_id, block in runtime.blocks.items())


def test_a_retry_that_waits_beside_its_original_steps_nothing(runtime: Runtime) -> None:
    held = Held(runtime)
    first, retry = backward(1, resend=True), backward(1, resend=True)
    runtime.submit(first)
    runtime.submit(retry)
    held.release()
    assert first.future.result(TIMEOUT_S).stepped
    assert not retry.future.result(TIMEOUT_S).stepped
    assert max(block.version for block in runtime.blocks.values()) == 1


def test_a_backward_without_kept_inputs_asks_for_them(runtime: Runtime) -> None:
    runtime.submit(forward(1, keep=False))
    asked = backward(1)
    runtime.submit(asked)
    with pytest.raises(UnknownRequestError, match="send them again"):
        asked.future.result(TIMEOUT_S)
    again = backward(1, resend=True)
    runtime.submit(again)
    assert again.future.result(TIMEOUT_S).stepped


def test_a_backward_whose_gradient_has_another_number_of_tokens_is_refused(runtime: Runtime) -> None:
    runtime.submit(forward(1))
    odd = BackwardJob(
        key=key(1), grad_TD=torch.zeros(5, 16, dtype=torch.float64), inputs=None, run_tokens=0, deadline=NEVER
    )
    runtime.submit(odd)
    with pytest.raises(UnknownRequestError, match="had 6 tokens, the gradient has 5"):
        odd.future.result(TIMEOUT_S)
    assert versions(runtime) == 0


def test_a_request_past_its_deadline_is_dropped_and_steps_nothing(runtime: Runtime) -> None:
    late = backward(1, resend=True, deadline=0.0)
    runtime.submit(late)
    with pytest.raises(DeadlineError):
        late.future.result(TIMEOUT_S)
    assert versions(runtime) == 0


def test_a_full_queue_refuses_with_a_delay_and_an_empty_one_takes_any_size() -> None:
    runtime = make_runtime(RuntimeConfig(max_queue_tokens=10))
    runtime.start()
    try:
        held = Held(runtime)
        first = forward(0)
        runtime.submit(first)
        with pytest.raises(OverloadedError, match="6 tokens wait, the limit is 10") as caught:
            runtime.submit(forward(1))
        assert 0 < caught.value.retry_after_s <= 5
        assert runtime.refused == 1
        held.release()
        first.future.result(TIMEOUT_S)
        big = forward(2, keep=False, n_tokens=50)
        runtime.submit(big)
        assert big.future.result(TIMEOUT_S).combined_TD.shape == (50, 16)
    finally:
        runtime.stop(TIMEOUT_S)


def test_a_batch_stays_within_its_bound_and_layers_are_not_mixed() -> None:
    runtime = make_runtime(RuntimeConfig(max_batch_tokens=12))
    runtime.start()
    try:
        held = Held(runtime)
        jobs = [forward(n, layer=n % 2) for n in range(6)]
        for job in jobs:
            runtime.submit(job)
        held.release()
        for job in jobs:
            blocks = runtime.layer_blocks(job.key.layer)
            wanted_TD = layer_forward(blocks, job.inputs.x_TD, job.inputs.pairs)
            torch.testing.assert_close(job.future.result(TIMEOUT_S).combined_TD, wanted_TD, rtol=0, atol=1e-12)
    finally:
        runtime.stop(TIMEOUT_S)


def test_stopping_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    runtime = make_runtime()
    runtime.start()
    held = Held(runtime)
    jobs = [forward(n) for n in range(3)]
    for job in jobs:
        runtime.submit(job)
    held.release()
    runtime.stop(TIMEOUT_S)
    wait([job.future for job in jobs], TIMEOUT_S)
    assert all(job.future.result(0).combined_TD.shape == (6, 16) for job in jobs)
    with pytest.raises(DrainingError):
        runtime.submit(forward(9))


def test_a_batch_that_fails_does_not_end_the_runtime(runtime: Runtime) -> None:
    good = forward(0, keep=False)
    narrow = dataclasses.replace(good.inputs, x_TD=torch.zeros(6, 5, dtype=torch.float64))
    broken = dataclasses.replace(good, inputs=narrow)
    runtime.submit(broken)
    with pytest.raises(KilohiveError, match="the host failed on this batch"):
        broken.future.result(TIMEOUT_S)
    good = forward(1)
    runtime.submit(good)
    assert good.future.result(TIMEOUT_S).combined_TD.shape == (6, 16)


def test_merged_requests_do_not_leave_each_others_tokens_behind_in_the_count(runtime: Runtime) -> None:
    for n in range(3):
        job = forward(n)
        runtime.submit(job)
        job.future.result(TIMEOUT_S)
    assert runtime.tokens_total == 18
    assert runtime.queue_tokens == 0


def test_kept_inputs_stay_within_their_bytes_oldest_out_first() -> None:
    one = inputs(1)
    kept = ActivationCache(max_bytes=2 * one.n_bytes, max_age_s=100, clock=lambda: 0.0)
    for n in range(3):
        kept.put(key(n), inputs(n))
    assert kept.get(key(0)) is None
    assert kept.get(key(1)) is not None
    assert kept.n_bytes == 2 * one.n_bytes
    kept.put(key(9), inputs(9, n_tokens=100))
    assert kept.get(key(9)) is None
    assert kept.get(key(2)) is not None


def test_kept_inputs_expire_by_age() -> None:
    now = 0.0
    kept = ActivationCache(max_bytes=1 << 20, max_age_s=10, clock=lambda: now)
    kept.put(key(1), inputs(1))
    now = 11.0
    assert kept.get(key(1)) is None
    assert kept.n_bytes == 0


def test_stepped_ids_are_bounded() -> None:
    stepped = SteppedIds(max_ids=2)
    for n in range(3):
        stepped.add(key(n))
    assert key(0) not in stepped
    assert key(2) in stepped


def test_blocks_of_a_layer_come_in_order() -> None:
    blocks = [new_block(MANIFEST, BlockId(0, b), CPU) for b in (2, 0, 1)]
    assert [b.id.block for b in Runtime(blocks, MANIFEST, RuntimeConfig()).layer_blocks(0)] == [0, 1, 2]


def test_a_host_may_start_with_no_block_and_is_given_one_while_it_runs() -> None:
    runtime = Runtime([], MANIFEST, RuntimeConfig())
    runtime.start()
    try:
        assert not runtime.blocks
        late = forward(1, experts=range(4))
        runtime.submit(late)
        with pytest.raises(NotHostedError, match="0/0 is not hosted here"):
            late.future.result(TIMEOUT_S)
        block = new_block(MANIFEST, BlockId(0, 0), CPU)
        runtime.add_block(block).result(TIMEOUT_S)
        assert dict(runtime.blocks) == {block.id: block}
        served = forward(2, experts=range(4))
        runtime.submit(served)
        wanted_TD = layer_forward([block], served.inputs.x_TD, served.inputs.pairs)
        torch.testing.assert_close(served.future.result(TIMEOUT_S).combined_TD, wanted_TD, rtol=0, atol=1e-12)
    finally:
        runtime.stop(TIMEOUT_S)


def test_a_block_is_added_once_and_removed_once(runtime: Runtime) -> None:
    block_id = BlockId(0, 2)
    with pytest.raises(InvalidInputError, match="0/2 is hosted here already"):
        runtime.add_block(new_block(MANIFEST, block_id, CPU)).result(TIMEOUT_S)
    before = runtime.blocks
    removed = runtime.remove_block(block_id).result(TIMEOUT_S)
    assert removed is before[block_id]
    assert block_id not in runtime.blocks
    assert [block.id.block for block in runtime.layer_blocks(0)] == [0, 1, 3]
    with pytest.raises(NotHostedError, match="0/2 is not hosted here"):
        runtime.remove_block(block_id).result(TIMEOUT_S)
    runtime.add_block(removed).result(TIMEOUT_S)
    assert [block.id.block for block in runtime.layer_blocks(0)] == [0, 1, 2, 3]


@pytest.fixture
def waiting() -> Iterator[Runtime]:
    """A runtime whose thread the test starts, once everything is queued."""
    runtime = make_runtime()
    yield runtime
    runtime.stop(TIMEOUT_S)


def test_forwards_that_wait_for_a_removed_block_fail_alone(waiting: Runtime) -> None:
    gone, kept = forward(1, experts=range(4, 8)), forward(2, experts=range(4))
    waiting.submit(gone)
    waiting.submit(kept)
    removal = waiting.remove_block(BlockId(0, 1))
    waiting.start()
    assert removal.result(TIMEOUT_S).id == BlockId(0, 1)
    with pytest.raises(NotHostedError, match="0/1 is not hosted here"):
        gone.future.result(TIMEOUT_S)
    wanted_TD = layer_forward(waiting.layer_blocks(0), kept.inputs.x_TD, kept.inputs.pairs)
    torch.testing.assert_close(kept.future.result(TIMEOUT_S).combined_TD, wanted_TD, rtol=0, atol=1e-12)


def test_backwards_that_wait_for_a_removed_block_fail_alone_and_step_nothing(waiting: Runtime) -> None:
    # Both touch block 0: what the failed one wants of it must not come about either.
    gone, kept = backward(1, resend=True, experts=range(8)), backward(2, resend=True, experts=range(4))
    waiting.submit(gone)
    waiting.submit(kept)
    removal = waiting.remove_block(BlockId(0, 1))
    waiting.start()
    removed = removal.result(TIMEOUT_S)
    with pytest.raises(NotHostedError, match="0/1 is not hosted here"):
        gone.future.result(TIMEOUT_S)
    assert kept.future.result(TIMEOUT_S).stepped
    assert removed.version == 0
    reference = new_block(MANIFEST, BlockId(0, 0), CPU)
    step_alone(reference, kept, MANIFEST)
    torch.testing.assert_close(waiting.layer_blocks(0)[0].params, reference.params, rtol=0, atol=1e-15)


def test_inputs_kept_for_a_block_that_has_left_do_not_bring_it_back(runtime: Runtime) -> None:
    asked = forward(1, experts=range(4, 8))
    runtime.submit(asked)
    asked.future.result(TIMEOUT_S)
    runtime.remove_block(BlockId(0, 1)).result(TIMEOUT_S)
    late = backward(1)
    runtime.submit(late)
    with pytest.raises(NotHostedError, match="0/1 is not hosted here"):
        late.future.result(TIMEOUT_S)


def test_readers_of_the_blocks_see_them_before_or_after_a_change_never_between(runtime: Runtime) -> None:
    before, of_layer = runtime.blocks, runtime.layer_blocks(1)
    runtime.remove_block(BlockId(1, 0)).result(TIMEOUT_S)
    assert len(before) == 8
    assert len(of_layer) == 4
    assert len(runtime.blocks) == 7


def test_bounds_that_change_while_it_runs_hold_for_the_queue_and_the_inputs_that_are_kept() -> None:
    runtime = make_runtime()
    runtime.start()
    try:
        first = forward(0)
        runtime.submit(first)
        first.future.result(TIMEOUT_S)
        assert runtime.kept_bytes > 0
        runtime.follow(RuntimeConfig(max_queue_tokens=10, keep_inputs_bytes=0)).result(TIMEOUT_S)
        assert runtime.kept_bytes == 0
        held = Held(runtime)
        runtime.submit(forward(1))
        with pytest.raises(OverloadedError, match="the limit is 10"):
            runtime.submit(forward(2))
        held.release()
    finally:
        runtime.stop(TIMEOUT_S)
