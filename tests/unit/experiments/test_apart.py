"""Trained apart and put together: what the merged model and the ensemble are, the plan's stages, and the finding."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import ConfigError
from experiments.apart.branches import Branches, BranchSchedule, Stage, StageRun
from experiments.apart.ensemble import by_posterior, evenly_weighted, forget_gates
from experiments.apart.experiment import EXPERIMENT, KINDS, PRESETS, Bench, planned
from experiments.apart.report import apart_report
from experiments.apart.shards import shards_of, split
from experiments.arms.arm import Arm
from experiments.arms.training import nats_per_window
from tests.support.trials import Context, topical_dataset

if TYPE_CHECKING:
    from experiments.harness.experiment import Result, Trial

COURSE = BranchSchedule(
    arm=Arm(label="2 of 8 experts", hidden=16, experts=8, per_token=2), seed=0, tokens=2_560, lr=5e-3, expert_lr=5e-3,
    d_model=16, layers=2, heads=2, context=16, batch=4, participants=2, branch_tokens=1_280, apart_tokens=640,
    evaluations=1, eval_bytes=256, final_eval_bytes=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    dataset = topical_dataset(tmp_path_factory.mktemp("data"))
    context = Context(tmp_path_factory.mktemp("trials") / "trial")
    return Bench(
        course=COURSE, sharding="topic", branches=Branches(COURSE, context, dataset), context=context, dataset=dataset
    )


def nats(bench: Bench, trunk: Any) -> float:
    return float(nats_per_window(trunk, bench.dataset, COURSE, 1_024).mean())


def test_a_shard_by_topic_has_one_topic_and_all_of_it(bench: Bench) -> None:
    documents = split(bench.dataset.train)
    shard_N = shards_of(bench.dataset, documents, "topic", 4, seed=0)
    seen = {(document.split()[0], int(shard)) for document, shard in zip(documents, shard_N, strict=True)}
    assert len(seen) == len({shard for _, shard in seen}) == 4


def test_the_merged_model_has_each_participants_experts_and_the_mean_of_their_trunks(bench: Bench) -> None:
    branches = bench.branches
    parts = [branches.load(folder, index) for index, folder in enumerate(branches.participants("topic"))]
    merged = branches.load(branches.merged("topic"))
    for index, part in enumerate(parts):
        for layer, (own,) in part.experts.blocks.items():
            assert merged.experts.blocks[layer][index].params["w_in"].equal(own.params["w_in"])
            rows = slice(own.experts.start, own.experts.stop)
            keys = "expert_keys_ED"
            ours, theirs = (model.layers[layer].gate.state_dict()[keys][rows] for model in (merged, part))
            assert ours.equal(theirs)
    heads = torch.stack([part.trunk.head_VD for part in parts])
    assert torch.allclose(merged.trunk.head_VD, heads.mean(0))


def test_a_forgotten_gate_changes_what_is_predicted_and_nothing_else(bench: Bench) -> None:
    model = bench.branches.load(bench.branches.merged("topic"))
    before, head = nats(bench, model.trunk), model.trunk.head_VD.clone()
    forget_gates(model, 1)
    assert nats(bench, model.trunk) != before
    assert model.trunk.head_VD.equal(head)


def trial(bench: Bench, kind: str, folder: str) -> Result:
    context = Context(bench.context.folder.parent / folder)
    branches = Branches(COURSE, context, bench.dataset)
    return KINDS[kind](replace(bench, context=context, branches=branches))


def test_learning_the_gate_alone_leaves_trunk_and_experts_as_they_were(bench: Bench) -> None:
    stage = Stage(first=COURSE.apart_step, last=COURSE.steps, gates_only=True)
    merged = bench.branches.merged("topic")
    context = Context(bench.context.folder.parent / "gate")
    run = StageRun(COURSE, stage, context, bench.dataset, merged)
    run.go()
    before = bench.branches.load(merged)
    for name, tensor in run.model.trunk.state_dict().items():
        assert tensor.equal(before.trunk.state_dict()[name]) is (".gate." not in name), name
    for layer, blocks in run.model.experts.blocks.items():
        for block, other in zip(blocks, before.experts.blocks[layer], strict=True):
            assert all(block.params[name].equal(other.params[name]) for name in block.params)


def test_joint_is_one_run_that_was_never_cut(bench: Bench) -> None:
    whole = StageRun(
        COURSE, Stage(first=0, last=COURSE.steps), Context(bench.context.folder.parent / "w"), bench.dataset, None
    )
    whole.go()
    joint = trial(bench, "joint", "joint")
    assert joint["tokens"] == COURSE.tokens
    assert joint["nats_per_byte"] == pytest.approx(
        nats_per_window(whole.model.trunk, bench.dataset, COURSE, 256).mean()
    )


def test_the_posterior_follows_whoever_predicts_the_window_best() -> None:
    good, bad = torch.full((1, 64), math.log(0.9)), torch.full((1, 64), math.log(0.1))
    log_p_PNT = torch.stack([good, bad]).double()
    assert float(evenly_weighted(log_p_PNT)) == pytest.approx(-math.log(0.5))
    first = -math.log(0.5)
    assert -math.log(0.9) < float(by_posterior(log_p_PNT)) < -math.log(0.9) + first / 64
    assert float(by_posterior(log_p_PNT[:, :, :1])) == pytest.approx(first), "it has seen nothing yet"


def trials_of(seeds: int, results_of: Any) -> tuple[list[Trial], dict[str, Result]]:
    """A finished plan of two ways to cut the text; `results_of` makes each trial's result."""
    plan = replace(PRESETS["full"], seeds=seeds, shardings=("topic", "random"), tuning_steps=0)
    results: dict[str, Result] = {}
    while todo := [trial for trial in planned(plan, results) if trial.name not in results]:
        results |= {trial.name: results_of(trial.spec) for trial in todo}
    return planned(plan, results), results


def test_every_kind_of_trial_gives_what_the_page_needs(bench: Bench) -> None:
    def run(spec: dict[str, Any]) -> Result:
        kind, sharding = spec["kind"], spec["sharding"]
        context = Context(bench.context.folder.parent / f"{kind}-{sharding}")
        branches = Branches(COURSE, context, bench.dataset)
        here = replace(bench, context=context, branches=branches, sharding=sharding)
        result: Result = json.loads(json.dumps(KINDS[kind](here)))
        return result

    trials, results = trials_of(1, run)
    report = apart_report(trials, results)
    assert "apart by topic, gate forgotten" in report.tables["Loss"]
    assert "ensemble by topic" in report.tables["Loss"]
    assert "apart at random, mixed" in report.tables["Load"]
    tuned = run({"kind": "tune", "sharding": "topic"})
    assert tuned["joint"] == results["joint-seed0"]["nats_per_byte"]
    assert tuned["mixed"] == results["apart-topic-seed0"]["mixed"]["nats_per_byte"]


GATE = {
    "dead_fraction": 0.0, "load_cv": 0.1, "load_max_over_mean": 1.2, "load_entropy_bits": 7.9, "n_live": 256,
    "overflow_fraction": 0.0,
}  # fmt: skip
BITS = [{"bits": 0.5, "shuffled_bits": 0.1, "shuffled_std": 0.01}]


def made_up(mixed: float, random: float = 0.0) -> Any:
    """Results by kind, joint at 2 nats per byte; seeds differ by a hundredth, the same in all arms."""
    levels = {"gate": 2.3, "ensemble": 2.25, "merged": 2.5, "mixed": mixed, "forgotten": 2.9}

    def figures(nats: float) -> Result:
        plain = {"nats_per_byte": nats, "window_nats": [nats - 0.1, nats + 0.1]}
        return {**plain, "gates": [GATE], "specialisation": {"byte class": BITS, "topic": BITS}}

    def result(spec: dict[str, Any]) -> Result:
        seed, worse = spec["course"]["seed"] / 100, random if spec["sharding"] == "random" else 0.0
        if spec["kind"] != "apart":
            return figures((2.0 if spec["kind"] == "joint" else 2.4) + seed) | {"start": figures(2.6 + seed)}
        found = {name: figures(nats + seed + worse) for name, nats in levels.items()}
        found["ensemble"] |= {"participants": [2.6] * 8, "even": figures(2.3)}
        return {**found, "participants": [2.7] * 8, "bytes": [500_000] * 8}

    return result


@pytest.mark.parametrize(
    ("mixed", "verdict"), [(2.1, "It holds here: "), (2.005, "It does not hold: "), (1.9, "It does not hold: ")]
)
def test_the_finding_can_say_that_it_does_not(mixed: float, verdict: str) -> None:
    assert apart_report(*trials_of(3, made_up(mixed))).finding.startswith(verdict)


def test_where_seeds_disagree_it_is_not_known() -> None:
    def result(spec: dict[str, Any]) -> Result:
        found: Result = made_up(2.02 + 0.05 * (spec["course"]["seed"] - 1))(spec)
        return found

    assert apart_report(*trials_of(3, result)).finding.startswith("It is not known: ")


def test_the_distance_from_joint_is_told_step_by_step() -> None:
    report = apart_report(*trials_of(3, made_up(2.1, random=0.05)))
    row = next(line for line in report.tables["Where the difference comes from"].splitlines() if "by topic" in line)
    numbers = [cell.split(" ± ")[0].strip() for cell in row.split("|")[2:-1]]
    assert numbers == ["0.500", "0.200", "0.200", "0.100", "40%", "40%", "0.400"]
    assert "mixing is 0.050" in report.finding


def test_an_arm_that_lacks_seeds_does_not_make_the_finding() -> None:
    trials, results = trials_of(3, made_up(2.1))
    kept = [trial for trial in trials if trial.name not in {"apart-random-seed1", "apart-random-seed2"}]
    lucky = next(trial for trial in kept if trial.name == "apart-random-seed0")
    results[lucky.name]["mixed"] |= {"nats_per_byte": 1.0, "window_nats": [0.9, 1.1]}
    kept[kept.index(lucky)] = replace(lucky, spec={**lucky.spec, "sharding": "cluster"})
    assert "apart by topic" in apart_report(kept, results).finding


def test_trials_wait_for_those_whose_weights_they_read() -> None:
    rates = {f"tune-lr{rate:g}": {"joint": rate, "mixed": -rate} for rate in (4e-3, 8e-3, 1.6e-2)}
    assert [trial.name for trial in EXPERIMENT.plan("full", {})] == list(rates)
    names = [trial.name for trial in EXPERIMENT.plan("full", rates)]
    assert "joint-seed0" in names, "it has another rate, and so a start of its own"
    assert not [name for name in names if name.startswith("apart")]
    alike = {name: {"joint": -rate["joint"], "mixed": rate["mixed"]} for name, rate in rates.items()}
    assert "joint-seed0" not in [trial.name for trial in EXPERIMENT.plan("full", alike)]
    names = [trial.name for trial in EXPERIMENT.plan("full", {**alike, "nothing-seed0": {}})]
    assert {"joint-seed0", "apart-topic-seed0", "apart-random-seed0", "apart-cluster-seed0"} <= set(names)
    assert "apart-topic-seed1" not in names


def test_a_report_that_is_wanted_too_early_says_what_makes_it() -> None:
    with pytest.raises(ConfigError, match=r"run_node\.py experiment apart --preset quick"):
        EXPERIMENT.report("quick", {})
