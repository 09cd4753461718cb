"""What the arms are made of: costs, gates, statistics, specialisation, plans, findings."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from experiments.arms import choosing, granularity, idiots, longer, thousands, tokens
from experiments.arms.arm import Arm, TrainSpec, cost
from experiments.arms.arms import ArmResults, Arms
from experiments.arms.gates import TableGate, frozen
from experiments.arms.labels import BYTE_CLASSES, byte_classes
from experiments.arms.report import edge_words, tokens_to
from experiments.arms.training import build_model
from experiments.harness.catalogue import MODULES, load
from experiments.harness.statistics import difference, estimate
from node.model.gate import TopKGate
from protocol.manifest import ModelConfig

CPU = torch.device("cpu")
MODEL = ModelConfig(d_model=16, experts_per_layer=64, experts_per_token=8)
PRODUCT_KEY = Arm(label="8 of 64", hidden=4, experts=64, per_token=8, gate="product_key")
ARMS = [
    Arm(label="dense", hidden=24),
    Arm(label="2 of 8", hidden=4, experts=8, per_token=2),
    PRODUCT_KEY,
    Arm(label="by hash", hidden=4, experts=64, per_token=8, gate="hash"),
]


def spec(arm: Arm, **changes: Any) -> TrainSpec:
    values = {"seed": 0, "tokens": 100_000, "lr": 4e-3, "expert_lr": 4e-3, "d_model": 16, "heads": 2, "context": 32}
    return TrainSpec(arm=arm, **{**values, **changes})


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.label)
def test_the_parameters_that_are_told_are_those_that_are_built(arm: Arm) -> None:
    model = build_model(spec(arm), CPU)
    matrices = sum(p.numel() for p in model.trunk.parameters() if p.dim() > 1)
    experts = sum(p.numel() for blocks in model.experts.blocks.values() for b in blocks for p in b.params.values())
    assert cost(spec(arm)).parameters == matrices + experts


def test_the_gate_counts_in_the_cost_of_a_token() -> None:
    with_gate, without = cost(spec(PRODUCT_KEY)), cost(spec(ARMS[3]))
    assert with_gate.flops_per_token - without.flops_per_token == with_gate.gate_flops_per_token > 0
    assert without.gate_flops_per_token == 0


def test_the_dense_arm_of_equal_flops_costs_at_least_what_any_arm_with_experts_costs() -> None:
    def flops(arm: Arm) -> int:
        return cost(TrainSpec(arm=arm, seed=0, tokens=1, lr=1.0, expert_lr=1.0)).flops_per_token

    assert flops(granularity.DENSE_FLOPS) >= max(map(flops, granularity.EXPERTS))
    assert {arm.active_width for arm in granularity.EXPERTS} == {256}


def test_the_arms_of_idiots_are_of_equal_active_and_nearly_equal_total_size() -> None:
    arms = (*idiots.SIZES, *idiots.NULLS)
    assert {arm.active_width for arm in arms} == {128}
    totals = [arm.hidden * arm.experts for arm in arms]
    assert max(totals) / min(totals) < 1.05


def test_a_seed_makes_the_same_model_and_another_seed_another() -> None:
    states = [build_model(spec(PRODUCT_KEY, seed=seed), CPU).trunk.state_dict() for seed in (1, 1, 2)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not states[0]["head_VD"].equal(states[2]["head_VD"])


def test_a_hash_gate_chooses_by_the_last_two_bytes_alone_and_chooses_distinct_experts() -> None:
    gate = TableGate(MODEL, torch.Generator().manual_seed(0))
    watched = torch.nn.Identity()
    gate.watch(watched)
    watched(torch.tensor([[65, 66, 67, 66, 67]]))
    first = gate(torch.randn(5, 16))
    second = gate(torch.randn(5, 16))
    ids_TK = first.expert_ids_TK
    assert ids_TK.equal(second.expert_ids_TK), "what the tokens are like does not matter"
    assert ids_TK[2].equal(ids_TK[4]), "B, C twice"
    assert not ids_TK[1].equal(ids_TK[3]), "B after A and B after C"
    assert all(len(set(row.tolist())) == 8 for row in ids_TK)
    assert torch.allclose(first.weights_TK, torch.full((5, 8), 1 / 8))


def test_a_frozen_gate_has_nothing_to_train_and_still_balances() -> None:
    gate = frozen(TopKGate(MODEL, torch.Generator().manual_seed(0)))
    assert [p for p in gate.parameters() if p.requires_grad] == []
    load_E = torch.zeros(64, dtype=torch.int64)
    load_E[0] = 100
    gate.update_balance(load_E)
    assert gate.bias_E[0] < gate.bias_E[1]


def test_an_interval_is_students() -> None:
    # 1, 2, 3: standard error 1/sqrt(3), t of 2 degrees of freedom 4.3027.
    found = estimate([1.0, 2.0, 3.0], "seeds")
    assert found.mean == pytest.approx(2.0)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert estimate([1.0], "seeds").half_width == 0.0


def test_a_difference_is_taken_pair_by_pair() -> None:
    windows = np.random.default_rng(0).normal(size=200)
    found = difference([list(windows - 0.1)], [list(windows)])
    assert found.over == "windows"
    assert found.mean == pytest.approx(-0.1)
    assert found.half_width < 1e-6, "what windows have in common falls out"
    over_seeds = difference([[1.0, 3.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]])
    assert over_seeds.over == "seeds"
    assert over_seeds.mean == pytest.approx(2.0)


def test_what_chance_can_do_is_said() -> None:
    assert estimate([-1.0, 1.0, 0.5], "seeds").words.endswith("worse, within what chance can do,")
    assert estimate([-1.0, -1.01, -0.99], "seeds").words == "1.000 ± 0.025 nats per byte better"


def test_every_byte_has_a_class() -> None:
    classes = byte_classes()
    said = {char: BYTE_CLASSES[classes[ord(char)]] for char in " 7Qez,é"}
    assert said == {
        " ": "space", "7": "digit", "Q": "capital", "e": "vowel", "z": "consonant", ",": "punctuation",
        "é": "beyond ASCII",
    }  # fmt: skip


def result(nats: float, loads: float = 0.0) -> dict[str, Any]:
    gate = {"n_live": 8, "dead_fraction": loads, "load_cv": 0.1, "load_max_over_mean": 1.1, "load_entropy_bits": 2.9}
    layer = {"bits": 0.5, "shuffled_bits": 0.1, "shuffled_std": 0.01}
    return {
        "nats_per_byte": nats, "window_nats": [nats - 0.01, nats + 0.01], "held_out": [(1, nats + 1), (2, nats)],
        "tokens": 100, "cpu_seconds": 1.0, "gates": [gate], "specialisation": {"byte class": [layer], "topic": [layer]},
    }  # fmt: skip


def test_rates_are_tuned_first_and_the_best_one_is_taken() -> None:
    arms = Arms(arms=(PRODUCT_KEY, ARMS[0]), tokens=1000, seeds=2, tuning_tokens=100)
    tuning = arms.plan({})
    assert [trial.name for trial in tuning[:3]] == [f"tune-8-of-64-lr{rate}" for rate in ("0.002", "0.004", "0.008")]
    results = {trial.name: result(2.0 if "0.008" in trial.name else 3.0) for trial in tuning if "8-of" in trial.name}
    plan = arms.plan(results)
    assert [trial.name for trial in plan[6:]] == ["8-of-64-seed0", "8-of-64-seed1"], "the other arm is not tuned yet"
    assert plan[6].spec["lr"] == plan[6].spec["expert_lr"] == 0.008
    found = ArmResults(plan, {**results, "8-of-64-seed0": result(1.5)})
    assert "perhaps not tuned: 8 of 64" in edge_words(found)


def test_the_tokens_to_a_goal_are_read_off_the_curve() -> None:
    curve = {"held_out": [(100, 3.0), (200, 2.0), (300, 1.0)]}
    assert tokens_to(curve, 1.5) == pytest.approx(250)
    assert tokens_to(curve, 0.5) is None


def granularity_finding(nats: dict[str, float], dead: float = 0.0) -> Any:
    trials = granularity.QUICK.plan({})
    results = {
        trial.name: result(nats.get(trial.spec["arm"]["label"], 2.0), dead if trial.spec["arm"]["experts"] else 0.0)
        for trial in trials
    }
    return granularity.EXPERIMENT.report("quick", results)


def test_the_finding_follows_the_results_whichever_they_are() -> None:
    better = granularity_finding({"8 of 529 experts": 1.8, "8 of 2,025 experts": 1.7})
    assert "8 of 2,025 experts are 0.300" in better.finding
    assert "better than a dense model of equal FLOPs (as expected)" in better.finding
    assert "more experts helped up to the most that were tried" in better.finding
    worse = granularity_finding({"8 of 529 experts": 2.3, "8 of 2,025 experts": 2.4}, dead=0.4)
    assert "worse than a dense model of equal FLOPs (less than the 0.10 that was expected)" in worse.finding
    assert "from 64 to 529 experts the gain is under 0.01" in worse.finding
    assert "Many are dead in: 2 of 8 experts; 8 of 64 experts" in worse.tables["Load"]


def test_choosing_sets_what_is_learnt_against_its_nulls() -> None:
    nats = {
        choosing.DENSE.label: 1.8,
        choosing.LEARNT.label: 1.45,
        choosing.FROZEN.label: 1.4,
        choosing.PRODUCT.label: 1.3,
    }
    results = {t.name: result(nats.get(t.spec["arm"]["label"], 1.6), 0.0) for t in choosing.QUICK.plan({})}
    finding = choosing.EXPERIMENT.report("quick", results).finding
    assert "0.500" in finding.split(choosing.DENSE.label)[0]
    assert "bytes is 0.300 " in finding
    assert "worse than the hash" in finding
    assert f"worse than {choosing.FROZEN.label}" in finding
    assert f"better than {choosing.HASHED_5.label}" in finding


def test_longer_says_whether_many_experts_are_better_than_dense_by_as_much_as_is_wanted() -> None:
    def finding(nats: float) -> str:
        trials = longer.QUICK.plan({})
        results = {t.name: result(nats if t.spec["arm"]["label"] == longer.MANY.label else 1.6) for t in trials}
        said: str = longer.EXPERIMENT.report("quick", results).finding
        return said

    assert "0.200" in finding(1.4)
    assert "equal FLOPs (as wanted) after 102,400 tokens" in finding(1.4)
    assert "(less than the 0.10 that was wanted)" in finding(1.55)
    assert f"worse than {longer.LEARNT_MANY.label}" in finding(1.7)
    assert {trial.spec["text"] for trial in longer.QUICK.plan({})} == {"long"}


def test_the_dense_arm_costs_at_least_what_any_other_does() -> None:
    def flops(arm: Arm) -> int:
        return cost(TrainSpec(arm=arm, seed=0, tokens=1, lr=1.0, expert_lr=1.0)).flops_per_token

    assert flops(choosing.DENSE) >= max(flops(arm) for arm in choosing.ARMS if arm != choosing.LEARNT_8)
    assert flops(longer.DENSE) >= max(map(flops, longer.ARMS))
    assert flops(thousands.DENSE_FLOPS) >= max(flops(arm) for arm in thousands.ARMS if arm != thousands.DENSE_TOTAL)


def test_tokens_trains_arms_in_bytes_on_as_much_text_and_compares_per_byte() -> None:
    specs = {t.name: TrainSpec.from_json(t.spec) for t in tokens.QUICK.plan({})}
    by_label = {spec.arm.label: spec for spec in specs.values()}
    assert by_label[tokens.HASHED_BYTES.label].tokens == tokens.BYTES_PER_TOKEN * by_label[tokens.DENSE.label].tokens
    assert [spec.manifest().model.vocab_size for spec in by_label.values()] == [4096, 4096, 256]
    nats = {tokens.HASHED_4.label: 1.3, tokens.DENSE.label: 1.4, tokens.HASHED_BYTES.label: 1.45}
    results = {name: result(nats[spec.arm.label]) for name, spec in specs.items()}
    said = tokens.EXPERIMENT.report("quick", results).finding
    assert said.startswith("Of tokens of a vocabulary of 4,096, the best way to choose is hash of 1 to 4 tokens: 0.1")
    assert "nats per byte better than dense; hash of 1 to 8 bytes is 0.150 nats per byte worse on as much text" in said


def test_thousands_sets_many_experts_against_tables_of_as_many_parameters() -> None:
    def parameters(arm: Arm) -> int:
        return cost(TrainSpec(arm=arm, seed=0, tokens=1, lr=1.0, expert_lr=1.0)).parameters

    assert parameters(thousands.TABLES) == pytest.approx(parameters(thousands.MANY), rel=0.01)
    nats = {"8 of 64 experts": 1.5, "8 of 529 experts": 1.4, "8 of 2,025 experts": 1.395}
    results = {t.name: result(nats.get(t.spec["arm"]["label"], 1.6)) for t in thousands.QUICK.plan({})}
    said = thousands.EXPERIMENT.report("quick", results).finding
    assert "8 of 2,025 experts are 0.205" in said
    assert "better than a dense model of equal FLOPs after 102,400 tokens" in said
    assert "from 529 to 2,025 experts the gain is under 0.01" in said


def test_a_hash_gate_of_several_heads_chooses_each_part_by_one_byte_more() -> None:
    gate = TableGate(replace(MODEL, gate_heads=4), torch.Generator().manual_seed(0))
    watched = torch.nn.Identity()
    gate.watch(watched)

    def chosen(ids: list[int]) -> torch.Tensor:
        watched(torch.tensor([ids]))
        found: torch.Tensor = gate(torch.randn(len(ids), 16)).expert_ids_TK
        return found

    before, after = chosen([65, 66, 67, 68, 69, 70, 71]), chosen([65, 33, 67, 68, 69, 70, 71])
    changed_TQ = (before != after).view(7, 4, 2).any(2)
    assert [changed_TQ[:, head].nonzero().flatten().tolist() for head in range(4)] == [
        [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]
    ]  # fmt: skip


def test_a_spec_of_the_first_recipe_is_written_as_results_have_it_and_another_comes_back_whole() -> None:
    assert "recipe" not in spec(PRODUCT_KEY).to_json()["arm"]
    other = spec(choosing.LEARNT)
    assert TrainSpec.from_json(json.loads(json.dumps(other.to_json()))) == other
    manifest = other.manifest()
    assert (manifest.model.gate_heads, manifest.optimizer.gate_lr_fraction) == (4, 0.04)
    assert "gate_shortest" not in other.to_json()["arm"]["recipe"], "results from before it was a field stay"
    product = spec(choosing.PRODUCT)
    assert TrainSpec.from_json(json.loads(json.dumps(product.to_json()))) == product
    assert (product.manifest().model.gate, product.manifest().model.gate_shortest) == ("hash", 1)
    assert spec(choosing.HASHED).manifest().model.gate == "topk", "the first runs' hash is no gate of the product"


def test_idiots_says_which_size_is_best_and_whether_the_gate_matters() -> None:
    trials = idiots.QUICK.plan({})
    nats = {idiots.NEURONS.label: 2.5, idiots.SMALL.label: 1.9, idiots.HASHED.label: 1.95}
    results = {trial.name: result(nats.get(trial.spec["arm"]["label"], 2.0)) for trial in trials}
    finding = idiots.EXPERIMENT.report("quick", results).finding
    assert f"{idiots.NEURONS.label}: 0.500" in finding
    assert "worse than 1 of 128 experts, H=128" in finding
    assert f"the best size was {idiots.SMALL.label}" in finding
    assert "a learnt gate is 0.000" in finding
    assert "within what chance can do, than a frozen one" in finding
    assert "0.050" in finding
    assert "worse than a hash of two bytes" in finding


def test_a_report_that_comes_too_early_says_what_to_run() -> None:
    with pytest.raises(ConfigError, match=r"granularity: no result yet of dense.*--preset full makes it"):
        granularity.EXPERIMENT.report("full", {})


@pytest.mark.parametrize("name", MODULES)
def test_every_experiment_plans_what_json_can_hold_under_names_of_their_own(name: str) -> None:
    experiment = load(name)
    assert experiment.name == name
    for preset in ("quick", "full"):
        trials = experiment.plan(preset, {})
        names = [trial.name for trial in trials]
        assert len(set(names)) == len(names) > 0
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)


def test_a_spec_survives_its_trip_through_json() -> None:
    there = spec(PRODUCT_KEY)
    assert TrainSpec.from_json(there.to_json()) == there
    assert asdict(there)["arm"]["gate"] == "product_key"


def test_an_unknown_experiment_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=f"no experiment 'granulrity'; it is one of {', '.join(MODULES)}"):
        load("granulrity")
