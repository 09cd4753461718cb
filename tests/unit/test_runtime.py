from __future__ import annotations

import threading
from concurrent.futures import wait
from typing import TYPE_CHECKING

import pytest
import torch

from node.experts.block import new_block
from node.experts.layer import Pairs, layer_backward, layer_forward
from node.serving.kept_inputs import Inputs, KeptInputs, RequestKey, SteppedIds
from node.serving.runtime import BackwardJob, ForwardJob, Runtime, RuntimeConfig
from protocol.errors import DeadlineError, DrainingError, KilohiveError, OverloadedError, UnknownRequestError
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = small_manifest(dtype="fp64")
NEVER = float("inf")
TIMEOUT_S = 10.0


def inputs(seed: int, n_tokens: int = 6) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        x_TD=torch.randn(n_tokens, 16, dtype=torch.float64, generator=generator),
        pairs=Pairs(
            token_P=torch.arange(n_tokens).repeat_interleave(2),
            expert_P=torch.randint(0, 16, (2 * n_tokens,), generator=generator),
            weight_P=torch.rand(2 * n_tokens, dtype=torch.float64, generator=generator),
        ),
    )


def key(number: int, layer: int = 0) -> RequestKey:
    return RequestKey(layer, number.to_bytes(16, "big"))


def forward(number: int, *, keep: bool = True, deadline: float = NEVER, layer: int = 0) -> ForwardJob:
    return ForwardJob(key=key(number, layer), inputs=inputs(number), keep=keep, deadline=deadline)


def backward(number: int, *, resend: bool = False, deadline: float = NEVER) -> BackwardJob:
    grad_TD = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + number))
    return BackwardJob(
        key=key(number), grad_TD=grad_TD, inputs=inputs(number) if resend else None, run_tokens=0, deadline=deadline
    )


def make(config: RuntimeConfig | None = None) -> Runtime:
    blocks = [new_block(MANIFEST, block, CPU) for block in all_blocks(MANIFEST.model)]
    return Runtime(blocks, MANIFEST.optimizer, config or RuntimeConfig())


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    running = make()
    running.start()
    yield running
    running.stop(TIMEOUT_S)


class Held:
    """Keeps the runtime's thread busy, so that jobs pile up behind it."""

    def __init__(self, runtime: Runtime) -> None:
        self._release = threading.Event()
        entered = threading.Event()

        def hold() -> None:
            entered.set()
            self._release.wait(TIMEOUT_S)

        runtime.call(hold)
        entered.wait(TIMEOUT_S)

    def release(self) -> None:
        self._release.set()


def versions(runtime: Runtime) -> int:
    return sum(block.version for block in runtime.blocks.values())


def test_requests_merged_into_one_batch_get_what_each_would_get_alone(runtime: Runtime) -> None:
    held = Held(runtime)
    jobs = [forward(n) for n in range(3)]
    for job in jobs:
        runtime.submit(job)
    held.release()
    blocks = runtime.layer_blocks(0)
    for job in jobs:
        alone_TD = layer_forward(blocks, job.inputs.x_TD, job.inputs.pairs)
        torch.testing.assert_close(job.future.result(TIMEOUT_S), alone_TD, rtol=0, atol=1e-12)


def test_a_merged_backward_steps_once_on_the_sum_and_answers_each_its_own(runtime: Runtime) -> None:
    for n in range(2):
        runtime.submit(forward(n))
    reference = make()
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
    runtime = make(RuntimeConfig(max_queue_tokens=10))
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
        big = ForwardJob(key=key(2), inputs=inputs(2, n_tokens=50), keep=False, deadline=NEVER)
        runtime.submit(big)
        assert big.future.result(TIMEOUT_S).shape == (50, 16)
    finally:
        runtime.stop(TIMEOUT_S)


def test_a_batch_stays_within_its_bound_and_layers_are_not_mixed() -> None:
    runtime = make(RuntimeConfig(max_batch_tokens=12))
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
            torch.testing.assert_close(job.future.result(TIMEOUT_S), wanted_TD, rtol=0, atol=1e-12)
    finally:
        runtime.stop(TIMEOUT_S)


def test_stopping_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    runtime = make()
    runtime.start()
    held = Held(runtime)
    jobs = [forward(n) for n in range(3)]
    for job in jobs:
        runtime.submit(job)
    held.release()
    runtime.stop(TIMEOUT_S)
    wait([job.future for job in jobs], TIMEOUT_S)
    assert all(job.future.result(0).shape == (6, 16) for job in jobs)
    with pytest.raises(DrainingError):
        runtime.submit(forward(9))


def test_a_batch_that_fails_does_not_end_the_runtime(runtime: Runtime) -> None:
    broken = ForwardJob(
        key=key(0),
        inputs=Inputs(torch.zeros(1, 5, dtype=torch.float64), inputs(0, 1).pairs),
        keep=False,
        deadline=NEVER,
    )
    runtime.submit(broken)
    with pytest.raises(KilohiveError, match="the host failed on this batch"):
        broken.future.result(TIMEOUT_S)
    good = forward(1)
    runtime.submit(good)
    assert good.future.result(TIMEOUT_S).shape == (6, 16)


def test_merged_requests_do_not_leave_each_others_tokens_behind_in_the_count(runtime: Runtime) -> None:
    for n in range(3):
        job = forward(n)
        runtime.submit(job)
        job.future.result(TIMEOUT_S)
    assert runtime.tokens_total == 18
    assert runtime.queue_tokens == 0


def test_kept_inputs_stay_within_their_bytes_oldest_out_first() -> None:
    one = inputs(1)
    kept = KeptInputs(max_bytes=2 * one.n_bytes, max_age_s=100, clock=lambda: 0.0)
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
    kept = KeptInputs(max_bytes=1 << 20, max_age_s=10, clock=lambda: now)
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
    assert [b.id.block for b in Runtime(blocks, MANIFEST.optimizer, RuntimeConfig()).layer_blocks(0)] == [0, 1, 2]
