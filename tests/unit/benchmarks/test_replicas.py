"""The parts of the benchmark of replicas that are no process: how far replicas are apart, what a row says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protocol.manifest import BlockId
from tests.benchmarks import replicas
from tests.benchmarks.replica_observer import Check, distance, schema_of

CONFIG = replicas.ReplicasBenchmark(json=Path("x"))


def check(ended_s: float, *distances: float, missed: int = 0) -> Check:
    divergence = {f"0/{index}": value for index, value in enumerate(distances)}
    return Check(began_s=ended_s - 1, ended_s=ended_s, divergence=divergence, missed=missed)


BASELINE = replicas.Arm(bits_per_byte=2.0, tokens=1000, tokens_per_s=4000.0)
REPLICATED = replicas.Arm(
    bits_per_byte=2.02,
    tokens=1010,
    tokens_per_s=3000.0,
    checks=(check(10, 0.01, 0.03), check(20, 0.02, 0.02)),
    settling=(check(32, 0.0005, 0.0008),),
    settled_s=7.0,
    met_max=0.025,
    exchanged_bytes=5_000_000,
    trunk_distance=0.004,
)


def test_distance_is_relative_to_the_smaller_replica_over_all_tensors() -> None:
    one = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    other = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([4.0])}
    assert distance(one, other) == pytest.approx(1 / 5)
    assert distance(other, one) == pytest.approx(1 / 5)
    assert distance(one, one) == 0.0


def test_an_observer_wants_what_a_host_of_the_default_manifest_has() -> None:
    manifest = CONFIG.manifest(replicas=2)
    wanted = {tensor.name: tensor.shape for tensor in schema_of(manifest, BlockId(1, 3))}
    assert {shape[0] for shape in wanted.values()} == {manifest.model.experts_per_block}
    assert {name.partition(".")[0] for name in wanted} == {"params", "first", "second"}


def test_both_runs_have_the_same_tokens_per_step_and_total() -> None:
    one, two = CONFIG.manifest(replicas=1), CONFIG.manifest(replicas=2)
    assert one.optimizer == two.optimizer
    assert one.optimizer.total_tokens == replicas.FULL_TOKENS
    assert (one.averaging.target_replicas, two.averaging.target_replicas) == (1, 2)
    alone, shared = CONFIG.train_flags(1, 0), CONFIG.train_flags(2, 1)
    assert alone[alone.index("--batch") + 1] == "8"
    assert shared[shared.index("--batch") + 1] == "4"
    assert shared[shared.index("--shard") + 1] == "1"


def test_replicas_have_settled_at_the_first_check_that_saw_every_block_near() -> None:
    far, unseen, near, later = check(12, 0.0005, 0.002), check(14, 0.0001, missed=1), check(16, 0.001), check(18, 0.0)
    assert replicas.settled_after_s([far, unseen, near, later], 10.0) == 6.0
    assert replicas.settled_after_s([far, unseen], 10.0) is None
    assert replicas.settled_after_s([check(12)], 10.0) is None, "nothing was looked at"


def test_rows_hold_the_limits_of_the_issue() -> None:
    rows = {row.metric: row for row in replicas.rows_of(BASELINE, REPLICATED)}
    assert (rows[replicas.LOSS].ratio, rows[replicas.LOSS].theirs) == (1.01, 2.0)
    assert (rows[replicas.LARGEST].ours, rows[replicas.LARGEST].theirs) == (0.03, 0.05)
    assert (rows[replicas.LARGEST_MET].ours, rows[replicas.LARGEST_MET].theirs) == (0.025, 0.05)
    assert rows[replicas.MEAN].ours == 0.02
    assert (rows[replicas.SETTLING].ours, rows[replicas.SETTLING].theirs, rows[replicas.SETTLING].note) == (7, 30, "")
    assert rows[replicas.SPEED].ratio == 0.75
    assert rows[replicas.EXCHANGED].ours == 5.0


def test_replicas_that_never_agreed_say_so() -> None:
    row = replicas.settling_row("case", replace(REPLICATED, settled_s=None))
    assert row.ours == replicas.SETTLE_PATIENCE_S
    assert row.note == "not within 60 s"


def test_training_without_a_check_gives_no_figure() -> None:
    with pytest.raises(RuntimeError, match="--tokens"):
        replicas.rows_of(BASELINE, replace(REPLICATED, checks=()))


def test_the_document_holds_every_check_and_says_what_was_not_seen() -> None:
    unseen = check(30, 0.01, missed=3)
    arm = replace(REPLICATED, checks=(*REPLICATED.checks, unseen))
    content = json.loads(json.dumps(replicas.content_of(replace(CONFIG, tokens=1000), BASELINE, arm)))
    assert [len(content["checks"][when]) for when in ("training", "after training")] == [3, 1]
    assert content["checks"]["training"][0]["divergence"] == {"0/0": 0.01, "0/1": 0.03}
    notes = "\n".join(content["machine"]["notes"])
    assert "over all checks: 3" in notes
    assert "1,010 by two trainers, 1,000 by one" in notes
    assert "only 1,000 tokens: not for the docs" in notes


def test_speed_adds_up_the_trainers_without_their_first_steps() -> None:
    steps = [{"t": 100.0, "own_tokens": 50}, {"t": 105.0, "own_tokens": 90}, {"t": 110.0, "own_tokens": 150}]
    assert replicas.speed([steps]) == 10.0
    assert replicas.speed([steps, steps]) == 20.0
