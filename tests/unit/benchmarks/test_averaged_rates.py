"""What the benchmark of learning rates adds to the product's parts: meetings in memory, and its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from node.data import open_dataset
from node.model.experts.state import block_state
from node.trainer.train_step import StepConfig
from protocol.manifest import BlockId
from tests.benchmarks.averaged_rates import ONE, ONE_FURTHER, TWO, Replicas, Trunks, exchange, new_training, rows_of
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.replica_state import ReplicaState

MANIFEST = small_manifest(optimizer={"lr": 1e-2, "expert_lr": 1e-2, "total_tokens": 20_000, "warmup_tokens": 256})


def assert_same(one: ReplicaState, other: ReplicaState) -> None:
    for name, tensor in one.named().items():
        torch.testing.assert_close(tensor, other.named()[name], rtol=1e-5, atol=1e-6)


def test_two_trainers_teach_two_replicas_which_meet_with_all_that_both_learnt(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Bee number {n} flies to flower {n % 7}." for n in range(600)))
    dataset = open_dataset(text, cache_dir=tmp_path / "cache", seed=0)
    experts = Replicas(MANIFEST, copies=2)
    steps = [StepConfig(batch=2, micro_batches=1, shard=shard, n_shards=2) for shard in (0, 1)]
    trainings = [new_training(MANIFEST, experts, dataset, config) for config in steps]
    trunks, block_id = Trunks(MANIFEST, trainings), BlockId(0, 0)
    try:
        for _ in range(6):
            for training in trainings:
                training.step()
        one, other = (block_state(block) for block in experts.of_block(block_id))
        assert one.version
        assert other.version
        assert not torch.equal(one.params["w_in"], other.params["w_in"])
        experts.meet(block_id)
        assert_same(one, other)
        own, other_trunk = (dict(training.model.named_parameters()) for training in trainings)
        assert any(not torch.equal(p, other_trunk[name]) for name, p in own.items())
        trunks.meet()
        for name, p in own.items():
            torch.testing.assert_close(p, other_trunk[name], rtol=1e-5, atol=1e-6)
    finally:
        for training in trainings:
            training.close()


def test_a_replica_that_has_learnt_nothing_since_moves_all_the_way() -> None:
    experts = Replicas(MANIFEST, copies=2)
    one, other = (block_state(block) for block in experts.of_block(BlockId(0, 0)))
    with torch.no_grad():
        other.params["w_in"].add_(0.01)
    other.learnt_R += 5.0
    taught = other.params["w_in"].clone()
    nothing = torch.zeros_like(one.learnt_R)
    exchange(MANIFEST, BlockId(0, 0), (one, other), (nothing, nothing))
    torch.testing.assert_close(one.params["w_in"], taught)
    torch.testing.assert_close(other.params["w_in"], taught)


def test_every_arm_of_two_is_compared_with_one_at_the_same_manifest() -> None:
    figures = {arm.name: [3.0, 2.0, 4.0] for arm in TWO} | {ONE.name: [2.0, 2.0, 2.0], ONE_FURTHER.name: [1.5] * 3}
    rows = rows_of(figures)
    assert [row.ratio for row in rows] == pytest.approx([1.5, 1.5, 1.5, 1.5, 2.0, 0.75])
    assert all(row.runs == 3 for row in rows)


def test_rates_are_multiples_of_the_manifests() -> None:
    manifest = TWO[2].manifest(1000, seed=4)
    plain = ONE.manifest(1000, seed=4)
    assert (manifest.optimizer.lr / plain.optimizer.lr) ** 2 == pytest.approx(2)
    assert (manifest.optimizer.expert_lr / plain.optimizer.expert_lr) ** 2 == pytest.approx(2)
