"""What is told of how experts live: gates over time, what is lost without experts, and the tables made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from experiments.arms import choosing
from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.arms import ArmResults
from experiments.arms.life import LOOKS, busiest_blocks, held_out_loads, without
from experiments.arms.life_report import KEPT, course, life_figures, life_tables
from experiments.arms.text import open_text
from experiments.arms.training import TrainRun, result_of
from experiments.harness.experiment import Trial
from node.trainer.inspection.ablation import groups_to_take

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.harness.experiment import Result

ARM = Arm(label="8 of 64", hidden=8, experts=64, per_token=8, gate="product_key", recipe=choosing.CODES)
SPEC = TrainSpec(
    arm=ARM, seed=0, tokens=2048, lr=4e-3, expert_lr=4e-3, d_model=32, layers=2, context=32, batch=4,
    eval_bytes=256, final_eval_bytes=256,
)  # fmt: skip


class Context:
    """As much of a trial's context as a run asks for."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        self.folder = self.shared = folder

    def progress(self, done: float, total: float, words: str) -> None:
        """Nobody looks."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRun, Result]:
    dataset = open_text()
    run = TrainRun(SPEC, Context(tmp_path_factory.mktemp("run")), dataset)
    run.go()
    return run, result_of(run, dataset)


def test_a_run_tells_at_each_quarter_what_its_gates_choose_and_what_they_keep(ended: tuple[TrainRun, Result]) -> None:
    _, result = ended
    assert [look["tokens"] for look in result["life"]] == [quarter * SPEC.tokens // LOOKS for quarter in (1, 2, 3, 4)]
    gates = [look["layers"] for look in result["life"]]
    assert [len(layers) for layers in gates] == [SPEC.layers] * LOOKS
    assert all(gate["kept_fraction"] is None for gate in gates[0]), "there was nothing to compare with"
    assert all(0.5 < gate["kept_fraction"] <= 1.0 for layers in gates[1:] for gate in layers)
    assert all(1.0 < gate["effective_k"] <= 8.0 for layers in gates for gate in layers)


def test_what_is_taken_away_is_so_many_experts_and_the_busiest_are_the_busiest(ended: tuple[TrainRun, Result]) -> None:
    run, result = ended
    assert [(ablation["taken"], ablation["experts"]) for ablation in result["ablated"]] == [
        ("1% at random", 1), ("10% at random", 6), ("the busiest 1%", 1), ("the idler half", 32)
    ]  # fmt: skip
    taken = dict(groups_to_take(held_out_loads(run.model, open_text(), SPEC.batch), SPEC.seed))
    assert not set(taken["the busiest 1%"][0].tolist()) & set(taken["the idler half"][0].tolist())


def test_the_busiest_block_has_at_least_the_mean_load(ended: tuple[TrainRun, Result]) -> None:
    run, result = ended
    assert len(result["busiest_block"]) == SPEC.layers
    assert all(1.0 <= ratio < 4.0 for ratio in result["busiest_block"])
    with without(run.model, [np.arange(8, 64), np.arange(8, 64)]):
        assert busiest_blocks(held_out_loads(run.model, open_text(), SPEC.batch)) == [8.0, 8.0], (
            "one block of eight has all of the load"
        )


def test_tokens_make_do_with_the_experts_that_are_left_or_with_none(ended: tuple[TrainRun, Result]) -> None:
    run, _ = ended
    gate = run.model.layers[0].gate
    reads_NQD = torch.randn(20, gate.n_heads, 32).sign()
    before = gate(reads_NQD)
    lost = before.expert_ids_TK[0, :3].numpy()
    everyone = np.arange(64)
    with torch.no_grad(), without(run.model, [lost, lost]):
        after = gate(reads_NQD)
    assert not np.isin(after.expert_ids_TK.numpy(), lost).any()
    kept_TK = after.expert_ids_TK == before.expert_ids_TK
    assert bool((kept_TK | (after.expert_ids_TK == -1)).all()), "what answers is chosen as ever"
    assert torch.allclose(after.weights_TK.sum(1), torch.ones(20))
    with torch.no_grad(), without(run.model, [everyone, everyone]):
        assert bool((gate(reads_NQD).weights_TK == 0).all())
    assert torch.equal(gate(reads_NQD).expert_ids_TK, before.expert_ids_TK), "they answer again"


def gate_stats(**traits: float | None) -> dict[str, float | None]:
    even = {"n_live": 64, "dead_fraction": 0.0, "load_cv": 0.5, "load_max_over_mean": 2.0, "load_entropy_bits": 5.4}
    return {**even, "effective_k": 7.0, "kept_fraction": None, **traits}


def lived(kept: float) -> dict[str, Any]:
    looks = [
        {"tokens": 512 * n, "layers": [gate_stats(kept_fraction=kept if n > 1 else None)] * 2} for n in (1, 2, 3, 4)
    ]
    taken = [{"taken": "1% at random", "experts": 2, "nats": 0.01}]
    return {"life": looks, "ablated": taken, "busiest_block": [1.2, 1.4]}


def found(*results: dict[str, Any]) -> ArmResults:
    trials = [Trial(name=f"seed{n}", spec=SPEC.to_json()) for n in range(len(results))]
    return ArmResults(trials, {trial.name: result for trial, result in zip(trials, results, strict=True)})


def test_tables_and_plots_tell_the_mean_of_the_seeds_by_quarter() -> None:
    results = [lived(0.8), lived(0.9)]
    assert course(results, KEPT) == pytest.approx([85.0] * 3), "the first quarter has nothing before it"
    cut = lived(0.7)
    cut["life"][2] = {"tokens": 1536, "layers": [gate_stats()] * 2}
    assert course([*results, cut], KEPT) == pytest.approx([80.0, 85.0, 80.0]), (
        "what was not looked at counts for nothing"
    )
    tables = life_tables(found(*results))
    assert (
        "| 8 of 64 | 0 0 0 0 | 0.5 0.5 0.5 0.5 | 2 2 2 2 | 90 90 90 90 | 7 7 7 7 | 85 85 85 | 1.30 |"
        in (tables["How experts live"])
    )
    assert "| 8 of 64 | 0.0100 (5) |" in tables["What experts are worth"]
    assert list(life_figures(found(*results))) == ["life"]


def test_results_from_before_gates_were_looked_at_make_no_table() -> None:
    older = found({"nats_per_byte": 2.0})
    assert life_tables(older) == {}
    assert life_figures(older) == {}
