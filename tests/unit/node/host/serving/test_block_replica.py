"""A hosted block through averaging's eyes: live tensors between batches, counters that hold, and blocks that leave."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import DrainingError, InvalidInputError, NotHostedError
from node.host.serving.block_replica import BlockReplica
from node.model.experts.block import new_block
from node.model.experts.state import block_from_state, block_state
from node.model.replica_state import schema
from protocol.manifest import BlockId
from tests.support.runtime_jobs import MANIFEST, TIMEOUT_S, Held, backward, forward, make_runtime, step_alone
from tests.support.swarm_parts import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.host.serving.runtime import Runtime
    from node.model.replica_state import ReplicaState

BLOCK = BlockId(0, 0)
EXPERTS = range(4)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    running = make_runtime()
    running.start()
    yield running
    running.stop(TIMEOUT_S)


@pytest.fixture
def replica(runtime: Runtime) -> BlockReplica:
    return BlockReplica(runtime, BLOCK)


def trained(runtime: Runtime) -> None:
    job = backward(1, resend=True, experts=EXPERTS)
    runtime.submit(job)
    job.future.result(TIMEOUT_S)


def test_the_state_of_a_call_is_the_blocks_own_tensors(runtime: Runtime, replica: BlockReplica) -> None:
    trained(runtime)
    block = runtime.blocks[BLOCK]
    state = replica.call(lambda live: live).result(TIMEOUT_S)
    assert all(state.params[name] is p for name, p in block.params.items())
    assert all(state.first[name] is m for name, m in block.adam.first.items())
    assert all(state.second[name] is v for name, v in block.adam.second.items())
    assert state.steps_R is block.adam.steps_E
    assert state.learnt_R.sum() == 12
    assert (state.version, replica.version, replica.id) == (1, 1, BLOCK)


def test_a_call_runs_on_the_thread_that_owns_the_weights(replica: BlockReplica) -> None:
    assert replica.call(lambda _: threading.current_thread().name).result(TIMEOUT_S) == "kilohive-runtime"


def test_what_a_call_changes_is_what_the_next_batch_computes_with(runtime: Runtime, replica: BlockReplica) -> None:
    def silence(state: ReplicaState) -> None:
        state.params["w_out"].zero_()

    held = Held(runtime)
    changed, job = replica.call(silence), forward(1, experts=EXPERTS)
    held.release()
    changed.result(TIMEOUT_S)
    runtime.submit(job)
    assert bool((job.future.result(TIMEOUT_S).combined_TD == 0).all())


def test_steps_and_version_that_a_call_sets_hold_and_are_gone_on_from(runtime: Runtime, replica: BlockReplica) -> None:
    def catch_up(state: ReplicaState) -> None:
        state.steps_R = torch.full_like(state.steps_R, 40)
        state.version = 90

    replica.call(catch_up).result(TIMEOUT_S)
    assert replica.version == 90
    job = backward(1, resend=True, version=90, experts=EXPERTS)
    runtime.submit(job)
    assert job.future.result(TIMEOUT_S).staleness == 0
    block = runtime.blocks[BLOCK]
    assert block.version == 91
    assert job.inputs
    touched = set(job.inputs.pairs.expert_P.tolist())
    assert block.adam.steps_E.tolist() == [41 if expert in touched else 40 for expert in EXPERTS]


def test_a_call_that_fails_changes_no_counter_and_does_not_end_the_runtime(
    runtime: Runtime, replica: BlockReplica
) -> None:
    def fail(state: ReplicaState) -> None:
        state.version = 7
        raise InvalidInputError("second", "is negative")

    with pytest.raises(InvalidInputError, match="second: is negative"):
        replica.call(fail).result(TIMEOUT_S)
    assert replica.version == 0
    trained(runtime)
    assert replica.version == 1


def test_a_block_that_left_fails_through_the_future(runtime: Runtime, replica: BlockReplica) -> None:
    waiting = Held(runtime)
    removal, call = runtime.remove_block(BLOCK), replica.call(lambda state: state.version)
    waiting.release()
    removal.result(TIMEOUT_S)
    with pytest.raises(NotHostedError, match="0/0 is not hosted here"):
        call.result(TIMEOUT_S)
    assert replica.version == 0


def test_a_block_that_came_back_is_the_one_that_is_averaged(runtime: Runtime, replica: BlockReplica) -> None:
    runtime.remove_block(BLOCK).result(TIMEOUT_S)
    other = new_block(MANIFEST, BLOCK, CPU)
    runtime.add_block(other).result(TIMEOUT_S)
    assert replica.call(lambda live: live.params["w_in"]).result(TIMEOUT_S) is other.params["w_in"]


def test_a_host_that_is_leaving_refuses_at_once() -> None:
    runtime = make_runtime()
    runtime.start()
    runtime.stop(TIMEOUT_S)
    with pytest.raises(DrainingError):
        BlockReplica(runtime, BLOCK).call(lambda _: None)


def test_a_joiner_goes_on_from_a_copy_exactly_as_the_original_does(runtime: Runtime, replica: BlockReplica) -> None:
    trained(runtime)
    copy = replica.call(lambda live: live.copy()).result(TIMEOUT_S)
    joined = block_from_state(MANIFEST, BLOCK, copy, CPU)
    original = runtime.blocks[BLOCK]
    assert schema(block_state(joined)) == schema(block_state(original))
    assert joined.version == 1
    assert joined.learnt_E.tolist() == [0, 0, 0, 0]
    job = backward(2, resend=True, version=1, experts=EXPERTS)
    runtime.submit(job)
    job.future.result(TIMEOUT_S)
    step_alone(joined, job, MANIFEST)
    left, right = block_state(joined), block_state(original)
    torch.testing.assert_close(left.named(), right.named(), rtol=0, atol=1e-15)
    assert torch.equal(left.steps_R, right.steps_R)


def test_a_look_sees_the_blocks_own_tensors_and_changes_no_counter(runtime: Runtime, replica: BlockReplica) -> None:
    trained(runtime)

    def look(state: ReplicaState) -> int:
        state.version, seen = 7, state.version
        return seen

    assert replica.look(look).result(TIMEOUT_S) == 1
    assert replica.version == 1
    assert replica.look(lambda live: live.params["w_in"]).result(TIMEOUT_S) is runtime.blocks[BLOCK].params["w_in"]


def test_a_look_at_a_block_that_left_fails_through_the_future(runtime: Runtime, replica: BlockReplica) -> None:
    runtime.remove_block(BLOCK).result(TIMEOUT_S)
    with pytest.raises(NotHostedError, match="0/0 is not hosted here"):
        replica.look(lambda state: state.version).result(TIMEOUT_S)
