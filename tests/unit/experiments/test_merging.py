"""Merges that are searched for, models that are chosen between, a trial of it all, and what the report says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from experiments.apart.branches import Branches, BranchSchedule
from experiments.apart.ensemble import by_posterior
from experiments.apart.shards import split
from experiments.arms.arm import Arm, cost
from experiments.arms.labels import Topics
from experiments.merging.branches import (
    EXPERIMENT,
    JOINT,
    PRESETS,
    WORDS,
    apart,
    distances,
    held_out_in_two,
    joint,
    owners,
)
from experiments.merging.choosing import by_prefix, by_topic, in_hindsight, models_by_prefix
from experiments.merging.report import MERGES, MergingResults, merging_report
from experiments.merging.search import (
    POPULATION,
    SCALES,
    TEMPERATURES,
    TIES_DENSITIES,
    TIES_SCALES,
    MergeSearch,
    SearchResult,
)
from tests.support.trials import Context, topical_dataset

if TYPE_CHECKING:
    from experiments.merging.merges import Weights
    from node.data import TextDataset

COURSE = BranchSchedule(
    arm=Arm(label="dense", hidden=16), seed=0, tokens=2_560, lr=5e-3, expert_lr=5e-3, d_model=16, layers=2, heads=2,
    context=16, batch=4, participants=4, branch_tokens=1_280, apart_tokens=1_280, evaluations=1, eval_bytes=256,
    final_eval_bytes=1_024,
)  # fmt: skip
SPEC: dict[str, Any] = {
    "kind": "late", "train": COURSE.to_json(), "evaluations": 2 * POPULATION, "validation_bytes": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return topical_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("trials") / "trial")


@pytest.fixture(scope="module")
def found(dataset: TextDataset, context: Context) -> dict[str, Any]:
    """Of a trial."""
    result: dict[str, Any] = json.loads(json.dumps(apart(SPEC, dataset, context)))
    return result


class Bowl:
    """A loss with its least value, 1, at `best`; counts how often it is asked for."""

    def __init__(self, best: Weights) -> None:
        self.best, self.asked = best, 0

    def __call__(self, weights: Weights) -> float:
        self.asked += 1
        return 1.0 + sum(float((weights[name] - best).square().sum()) for name, best in self.best.items())


def corners() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base of zeros, and two participants that have each learnt one value of each of two groups."""
    base = {"embedding": torch.zeros(2), "head": torch.zeros(2)}
    return base, [{name: torch.eye(2)[index] for name in base} for index in range(2)]


def bowl_search(embedding: tuple[float, float], head: tuple[float, float]) -> tuple[MergeSearch, Bowl]:
    bowl = Bowl({"embedding": torch.tensor(embedding), "head": torch.tensor(head)})
    search = MergeSearch(*corners(), bowl)
    bowl.asked = 0
    return search, bowl


def test_a_search_takes_the_best_of_what_it_tries_and_says_how_many_it_measured() -> None:
    search, bowl = bowl_search((0.34, 0.36), (0.35, 0.35))
    scaled = search.scaled()
    assert scaled.chosen == "scale 0.35"
    assert bowl.asked == scaled.evaluations == len(SCALES)
    assert scaled.nats == pytest.approx(1.0, abs=1e-3)
    assert bowl(scaled.weights) == pytest.approx(scaled.nats)


def test_ties_are_tried_at_every_density_and_scale() -> None:
    search, bowl = bowl_search((1.5, 1.5), (1.5, 1.5))
    elected = search.elected()
    assert "scale 1.5" in elected.chosen
    assert bowl.asked == elected.evaluations == len(TIES_DENSITIES) * len(TIES_SCALES)


def test_a_weighted_average_leans_to_the_participant_that_is_better_and_counts_their_losses() -> None:
    search, bowl = bowl_search((0.9, 0.1), (0.9, 0.1))
    assert search.best_participant().chosen == "participant 0"
    weighted = search.weighted()
    assert weighted.weights["head"][0] > 0.99
    assert weighted.evaluations == len(TEMPERATURES) + 2 == bowl.asked + 2


def test_the_average_needs_no_measuring() -> None:
    search, _ = bowl_search((0.5, 0.5), (0.5, 0.5))
    plain = search.plain()
    assert plain.evaluations == 0
    assert plain.nats == pytest.approx(1.0)


@pytest.mark.parametrize("way", ["evolved", "thrown"])
def test_a_search_by_layer_measures_as_often_as_it_is_told_and_is_never_worse_than_the_average(way: str) -> None:
    search, bowl = bowl_search((0.5, 0.5), (0.5, 0.5))
    found: SearchResult = getattr(search, way)(6 * POPULATION, np.random.default_rng(0))
    assert bowl.asked == found.evaluations == len(found.best_so_far) == 6 * POPULATION
    assert found.nats == pytest.approx(1.0), "the average, with which it begins, is the best there is"
    assert bowl(found.weights) == pytest.approx(found.nats)


def test_evolution_finds_shares_for_each_layer_better_than_as_many_draws() -> None:
    nats: dict[str, list[float]] = {"evolved": [], "thrown": []}
    for seed in range(5):
        search, _ = bowl_search((0.9, 0.1), (0.1, 0.8))
        for way, of in nats.items():
            of.append(getattr(search, way)(20 * POPULATION, np.random.default_rng(seed)).nats)
    assert max(nats["evolved"]) < min(nats["thrown"])
    assert max(nats["evolved"]) < 1.005


def test_a_search_of_one_seed_finds_the_same_again() -> None:
    rows = [bowl_search((0.9, 0.1), (0.1, 0.8))[0].evolved(24, np.random.default_rng(3)).best_so_far for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0] == sorted(rows[0], reverse=True)


LOG_P_PNT = torch.tensor([[[-1.0, -1.0, -5.0, -5.0]], [[-2.0, -2.0, -1.0, -1.0]]], dtype=torch.float64)


def test_the_model_that_is_chosen_by_a_prefix_predicts_the_rest() -> None:
    # The first is likelier on two bytes, at -2 against -4, and is kept for the two where it is the worse one.
    mixture = -math.log(0.5 * math.exp(-2) + 0.5 * math.exp(-4))
    assert by_prefix(LOG_P_PNT, 2).tolist() == pytest.approx([(mixture + 10.0) / 4])
    # On three bytes the second is likelier, at -5 against -7.
    mixture = -math.log(0.5 * math.exp(-7) + 0.5 * math.exp(-5))
    assert by_prefix(LOG_P_PNT, 3).tolist() == pytest.approx([(mixture + 1.0) / 4])
    assert models_by_prefix(4, 128, 32) == pytest.approx(1.75)


def test_a_prefix_that_is_longer_than_the_window_is_the_window() -> None:
    assert by_prefix(LOG_P_PNT, 32).tolist() == pytest.approx(by_posterior(LOG_P_PNT).tolist())
    assert models_by_prefix(4, 16, 32) == 4.0


def test_the_best_in_hindsight_bounds_every_choice_of_one_model() -> None:
    log_p_PNT = -torch.rand(4, 50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    bound_N = in_hindsight(log_p_PNT)
    for model in range(4):
        told_N = by_topic(log_p_PNT, torch.full((50,), model))
        assert told_N.tolist() == pytest.approx((-log_p_PNT[model].mean(1)).tolist())
        assert (told_N >= bound_N).all()
    # The posterior pays at most the choice of one of four, log 4 nats in a window.
    assert (by_posterior(log_p_PNT) <= bound_N + math.log(4) / 16 + 1e-9).all()


def test_the_held_out_text_is_cut_in_two_by_document(dataset: TextDataset) -> None:
    texts = held_out_in_two(dataset)
    documents, chosen_on, figures = (split(t.held_out) for t in (dataset, texts.chosen_on, texts.figures))
    assert sorted(chosen_on + figures) == sorted(documents)
    assert set(chosen_on) & set(figures) == set()
    assert len(chosen_on) == -(-len(documents) // 4)
    assert len(texts.topic_X) == len(texts.figures.held_out)
    assert texts.figures.train is dataset.train


def test_a_windows_owner_is_the_participant_that_has_read_its_topic(dataset: TextDataset, context: Context) -> None:
    texts = held_out_in_two(dataset)
    owner_N = owners(dataset, texts, COURSE)
    branches = Branches(COURSE, context, dataset)
    words = [branches.text("topic", index).train.tobytes()[:5] for index in range(4)]
    names = Topics(dataset).names
    windows = torch.cat(list(texts.topics().held_out_batches(4, 16, COURSE.final_eval_bytes)))
    assert len(owner_N) == len(windows) > 32
    assert [words[owner] for owner in owner_N] == [f"{names[topic]} "[:5].encode() for topic in windows[:, 0]]


def test_a_trial_measures_every_way_and_what_it_cost(found: dict[str, Any], dataset: TextDataset) -> None:
    ways = found["ways"]
    assert set(MERGES) < set(ways)
    assert {name: way["nats"] for name, way in ways.items() if not 2.0 < way["nats"] < 5.5} == {}
    assert ways["average"]["nats"] < ways["the branch, before they part"]["nats"]
    assert ways["one, in hindsight"]["nats"] <= min(found["participants"])
    assert ways["evolved by layer"]["evaluations"] == ways["random by layer"]["evaluations"] == 2 * POPULATION
    assert ways["random by layer"]["chosen_nats"] <= ways["average"]["chosen_nats"]
    assert found["bytes_of_evaluation"] == 256
    assert found["length"] > 0


def test_a_trial_that_was_cut_goes_on_to_the_same_result(
    found: dict[str, Any], dataset: TextDataset, context: Context
) -> None:
    told = context.told
    again = json.loads(json.dumps(apart(SPEC, dataset, context)))
    assert context.told - told < 2 * told, "nothing is trained again"
    assert again == found


def test_the_joint_model_learns_from_as_many_tokens_as_branch_and_participants(
    dataset: TextDataset, context: Context
) -> None:
    spec = {"train": {key: value for key, value in COURSE.to_json().items() if key not in {
        "participants", "branch_tokens", "apart_tokens"}}}  # fmt: skip
    result = joint(spec, dataset, Context(context.folder.parent / "joint"))
    assert result["tokens"] == COURSE.tokens
    plan = PRESETS["full"]
    assert {plan.course(0, quarters).tokens for quarters in (1, 3)} == {plan.joint(0).tokens}
    course = plan.course(0, 3)
    assert course.branch_tokens + course.apart_tokens == course.tokens == course.branch_tokens * 4 // 3


def test_participants_that_go_opposite_ways_have_a_cosine_of_minus_one() -> None:
    base = {"head": torch.tensor([3.0, 4.0])}
    ways = [{"head": base["head"] + sign * torch.tensor([0.0, 0.5])} for sign in (1.0, -1.0)]
    assert distances(base, ways) == {"length": pytest.approx(0.1), "cosine": pytest.approx(-1.0)}


def results(found: dict[str, Any], seeds: int, **nats: float) -> MergingResults:
    """Of so many seeds alike, but for a little noise that all ways share; `nats` by way, `_` for blanks."""
    apart_by = {}
    wanted = {name.replace("_", " "): value for name, value in nats.items()}
    for kind in ("late", "early"):
        ways = [
            {
                name: {**way, "nats": wanted.get(name, 2.0) + 0.1 * seed + 0.001 * (seed % 2)}
                | ({"chosen_nats": wanted.get(name, 2.0)} if "chosen_nats" in way else {})
                for name, way in found["ways"].items()
            }
            for seed in range(seeds)
        ]
        apart_by[kind] = [{**found, "ways": way} for way in ways]
    joint_rows = [{"nats": wanted.get(JOINT, 1.9) + 0.1 * seed} for seed in range(seeds)]
    plan = PRESETS["full"]
    return MergingResults(words=WORDS, together={JOINT: joint_rows}, apart=apart_by, cost=cost(plan.joint(0)))


def test_the_finding_says_it_is_where_nothing_that_was_searched_for_sticks(found: dict[str, Any]) -> None:
    report = merging_report(results(found, 3, TIES=1.99, random_by_layer=1.9))
    assert report.finding.startswith(
        "Where one searches, it is: the merge that the text to choose on prefers is nowhere surely better"
    )
    assert "Parting late, the average is" in report.finding
    assert "the merge that was chosen (TIES) is 0.010" in report.finding
    assert "worse than joint training" in report.finding


def test_the_finding_says_it_is_not_where_a_search_beats_the_average_and_the_wall(found: dict[str, Any]) -> None:
    finding = merging_report(results(found, 3, evolved_by_layer=1.8, random_by_layer=1.95)).finding
    assert finding.startswith("It is not: the merge that is chosen is better than the average and than as many random")
    assert "the merge that was chosen (evolved by layer) is 0.200" in finding


def test_the_finding_says_where_it_sticks_if_only_there(found: dict[str, Any]) -> None:
    rows = results(found, 3, TIES=1.8)
    flat = results(found, 3)
    mixed = replace(rows, apart={"late": rows.apart["late"], "early": flat.apart["early"]})
    assert merging_report(mixed).finding.startswith("Only in part: ")
    assert "random shares parting late. " in merging_report(mixed).finding


def test_one_seed_tells_nothing_of_chance(found: dict[str, Any]) -> None:
    assert merging_report(results(found, 1, TIES=1.0)).finding.startswith("One seed cannot tell. ")


def test_the_report_tells_costs_choices_and_distances_and_draws(found: dict[str, Any]) -> None:
    report = merging_report(results(found, 2))
    costs = report.tables["What it costs"].splitlines()
    evolved = next(line for line in costs if line.startswith("| evolved by layer"))
    assert f"| {2 * POPULATION} | {2 * POPULATION * 256:,} |" in evolved
    assert "| ensemble by the posterior | 0 | 0 | 0 | 0 | 4.00 |" in report.tables["What it costs"]
    assert "| trained jointly | 1.950" in report.tables["Loss, parting late"]
    assert "sums of shares: embedding" in report.tables["What was chosen"]
    assert report.tables["How far apart"].count("parting") == 2
    assert set(report.figures) == {"ways", "search"}


def test_a_report_waits_for_a_whole_seed(found: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="merging: no result yet of a whole seed"):
        EXPERIMENT.report("full", {"joint-seed0": {"nats": 2.0}, "late-seed0": found})
    whole = {"joint-seed0": {"nats": 2.0}, "late-seed0": found, "early-seed0": found, "joint-seed1": {"nats": 2.0}}
    assert EXPERIMENT.report("full", whole).finding


def test_a_plan_is_the_same_after_its_trip_through_json() -> None:
    for trial in EXPERIMENT.plan("full", {}):
        spec = json.loads(json.dumps(trial.spec))
        assert spec == trial.spec
        if spec["kind"] != "joint":
            assert BranchSchedule.from_json(spec["train"]).to_json() == spec["train"]
