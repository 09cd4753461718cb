"""Adapters around a frozen seed: trained together and apart, put together, measured, told. With a tiny random seed."""

from __future__ import annotations

import importlib.metadata
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from experiments.adapters.adapting import (
    AdapterGrid,
    AdapterRun,
    moe_layers,
    nats_per_window,
    train_adapters,
    train_apart,
)
from experiments.adapters.apart import ArrowGate, arrow, merged, prototypes, seed_alone, together
from experiments.adapters.arms import ALONE, AdapterArms, AdapterTrial
from experiments.adapters.domains import DOMAINS, WEAK, DomainName, parted
from experiments.adapters.experiment import ARMS, EXPERIMENT, FULL, AdaptersExperiment, run_trial
from experiments.adapters.measuring import shares, specialisation
from experiments.adapters.seed import TextPlan, Texts, open_texts
from experiments.adapters.volunteer import CALL_TOKENS, volunteer, wire_bytes
from protocol.manifest import ModelConfig
from tests.support.tiny_domain import tiny_domain
from tests.support.tiny_pretrained import SHAPE, save_pretrained
from tests.support.trials import Context

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.adapters.adapting import Adapters
    from experiments.harness.experiment import Report, Result

TEXT = TextPlan(training=12, tuning=2, held_out=3, window_tokens=16, layers=2)
GRIDS = {16: AdapterGrid(rank=4), 2: AdapterGrid(rank=2, experts=8, per_token=2)}
SMALL_ARMS = tuple(replace(arm, grid=arm.grid and GRIDS[arm.grid.rank]) for arm in ARMS if "1,024" not in arm.label)
SMALL = AdapterArms(arms=SMALL_ARMS, text=replace(TEXT, training=6), seeds=2, rates=(3e-2, 1e-1), tuning_windows=2)
D_MODEL = SHAPE["hidden_size"]
RUN = AdapterRun(grid=GRIDS[2], layers=2, rate=3e-2, seed=0)
ONE = replace(RUN, grid=GRIDS[16])


def ignore(done: float, total: float, words: str) -> None:
    assert done <= total


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pretrained(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def texts(model: str, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return open_texts(model, tiny_domain, TEXT, tmp_path_factory.mktemp("shared"), ignore)


@pytest.fixture(scope="module")
def alone(texts: Texts) -> dict[DomainName, Adapters]:
    return train_apart(ONE, texts.seed, texts.training, ignore)


def run_all(arms: AdapterArms, model: str, context: Context) -> tuple[list[list[str]], dict[str, Result]]:
    """Stage by stage, as the runner does."""
    stages: list[list[str]] = []
    results: dict[str, Result] = {}
    while todo := [trial for trial in arms.plan(results) if trial.name not in results]:
        stages.append([trial.name for trial in todo])
        for trial in todo:
            spec = AdapterTrial.from_json(json.loads(json.dumps(trial.spec)))
            results[trial.name] = json.loads(json.dumps(run_trial(spec, model, tiny_domain, context)))
    return stages, results


def test_the_whole_experiment_goes_from_the_seed_alone_over_rates_to_a_report(model: str, tmp_path: Path) -> None:
    stages, results = run_all(SMALL, model, Context(tmp_path / "trial"))
    assert stages[0] == [ALONE]
    assert len(stages[1]) == 3 * len(SMALL.rates), "adapters that are trained apart are tuned once for all their ways"
    assert all(name.startswith("tune-") for name in stages[1])
    in_tuning = {name: results[name]["tokens"] for name in stages[1]}
    assert in_tuning["tune-apart-rank4-lr0.1"] == 3 * in_tuning["tune-2-of-8-rank2-lr0.1"], "as many steps an adapter"
    final = [name for stage in stages[2:] for name in stage]
    assert all("-seed" in name for name in final)
    assert {results[name]["tokens"] for name in final} == {3 * 6 * TEXT.window_tokens}, "every arm learns from as many"

    report = AdaptersExperiment({"quick": SMALL, "full": SMALL}).report("quick", results)
    assert "8 of 256 adapters are" in report.finding
    assert "nats per token" in report.finding
    assert "is left without further training" in report.finding
    for arm in SMALL_ARMS:
        assert arm.label in report.tables["Loss where the seed is weak"]
    english = report.tables["What is forgotten"]
    assert "| trained apart, each domain its own" not in english
    assert "trained apart, merged" in english
    assert set(report.figures) == {"domains"}


def test_adapters_begin_as_nothing_and_learn_what_the_seed_does_not_know(texts: Texts) -> None:
    training, plain = list(texts.training.values()), seed_alone(texts.seed)
    untrained = train_adapters(replace(RUN, rate=0.0), texts.seed, training, ignore)
    trained = train_adapters(RUN, texts.seed, training, ignore)
    for name in WEAK:
        nats = nats_per_window(plain, texts.held_out[name])
        assert nats_per_window(untrained.trunk, texts.held_out[name]) == pytest.approx(nats)
        assert np.mean(nats_per_window(trained.trunk, texts.held_out[name])) < np.mean(nats) - 0.2


def test_the_same_seed_trains_the_same_adapters(texts: Texts) -> None:
    one, two = (train_adapters(RUN, texts.seed, list(texts.training.values()), ignore) for _ in range(2))
    for ours, theirs in zip(one.weights(), two.weights(), strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_adapters_are_trained_apart_on_their_domain_alone(texts: Texts, alone: dict[DomainName, Adapters]) -> None:
    for name in WEAK:
        nats = {own: np.mean(nats_per_window(alone[own].trunk, texts.held_out[name])) for own in WEAK}
        assert min(nats, key=lambda own: nats[own]) == name


def test_nothing_is_tuned_or_tested_on_that_was_trained_on() -> None:
    for name in DOMAINS:
        domain = tiny_domain(name)
        training, tuning = parted(domain.training)
        assert len({*training, *tuning, *domain.held_out}) == len(training) + len(tuning) + len(domain.held_out)
        assert len(training) > len(tuning) > 0


def test_the_merged_adapter_gives_the_mean_of_what_the_adapters_give(
    texts: Texts, alone: dict[DomainName, Adapters]
) -> None:
    x_ND = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    for layer, adapter in enumerate(merged(texts.seed, list(alone.values())).moe_layers):
        outputs = [adapters.layers[layer].eval()(x_ND).detach() for adapters in alone.values()]
        assert torch.allclose(adapter(x_ND), torch.stack(outputs).mean(0), atol=1e-5)
        assert any(bool(output.abs().max() > 0.01) for output in outputs)


def test_a_prototype_is_the_direction_that_an_adapter_amplifies_most() -> None:
    generator = torch.Generator().manual_seed(0)
    a_EDR, b_ERD = torch.randn(3, 8, 2, generator=generator), torch.randn(3, 2, 8, generator=generator)
    for a_DR, b_RD, prototype_D in zip(a_EDR, b_ERD, prototypes(a_EDR, b_ERD), strict=True):
        whole_DD = a_DR @ b_RD
        assert torch.linalg.svd(whole_DD).S[0] == pytest.approx(float((prototype_D @ whole_DD).norm()), rel=1e-5)
        assert float(prototype_D.norm()) == pytest.approx(1.0, rel=1e-5)


def test_arrow_sends_a_token_where_it_points_whichever_way_and_weighs_by_softmax() -> None:
    model = ModelConfig(d_model=4, n_heads=1, experts_per_layer=3, experts_per_token=1)
    prototypes_ED = torch.eye(4)[:3]
    x_TD = torch.tensor([[0.0, -2.0, 0.0, 9.0], [1.0, 0.5, 0.2, 0.0]])
    one = ArrowGate(model, prototypes_ED)(x_TD)
    assert one.expert_ids_TK.tolist() == [[1], [0]]
    assert one.weights_TK.flatten().tolist() == pytest.approx([1.0, 1.0])
    every = ArrowGate(replace(model, experts_per_token=3), prototypes_ED)(x_TD)
    by_expert = torch.zeros(2, 3).scatter(1, every.expert_ids_TK, every.weights_TK)
    assert torch.allclose(by_expert, torch.softmax(x_TD[:, :3].abs(), 1), atol=1e-5)


def test_arrow_uses_the_adapters_that_were_trained_apart(texts: Texts, alone: dict[DomainName, Adapters]) -> None:
    adapters = list(alone.values())
    x_ND = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for layer, moe in enumerate(moe_layers(arrow(texts.seed, adapters, 1))):
        chosen_N = moe.gate(x_ND).expert_ids_TK[:, 0].tolist()
        assert len(set(chosen_N)) > 1
        wanted = [adapters[expert].layers[layer].eval()(x_ND[n : n + 1]) for n, expert in enumerate(chosen_N)]
        assert torch.allclose(moe.eval()(x_ND), torch.cat(wanted), atol=1e-5)
    assert together(adapters).manifest.model.experts_per_layer == 3


def test_what_the_choices_tell_of_the_domain_is_held_against_shuffled_windows() -> None:
    choices = {name: [torch.full((6, 8), index)] for index, name in enumerate(DOMAINS)}
    (layer,) = specialisation(choices)
    assert layer["bits"] == pytest.approx(2.0)
    assert layer["shuffled_bits"] < 1.0
    assert shares(choices["german"], 4) == [0.0, 1.0, 0.0, 0.0]


def test_a_volunteer_gives_twelve_bytes_for_a_parameter_and_little_more_than_the_values_on_the_wire(
    texts: Texts,
) -> None:
    around = replace(texts.seed.manifest, model=replace(texts.seed.manifest.model, d_model=576))
    run = AdapterRun(grid=FULL.arms[2].grid or GRIDS[2], layers=TEXT.layers, rate=0.03, seed=0)
    manifest = run.manifest(around, 1000)
    own = volunteer(manifest)
    assert own.parameters == 2 * 576 * 2
    assert own.memory_bytes == 12 * own.parameters + 16, "weights, two moments, two counters"
    assert own.share == 8 / 256
    # Four tensors of a token, int8 with one scale each, and token, expert, weight and the weight's gradient.
    values = 4 * (576 + 4) + 4 * 4
    assert values < own.wire_bytes_per_token < 1.01 * values
    assert own.wire_bytes_per_token == wire_bytes(manifest, CALL_TOKENS) / CALL_TOKENS


def report(nats: dict[str, float], english: dict[str, float]) -> Report:
    """Of results that hold these mean nats per token by arm's label, with a little spread between seeds."""
    results: dict[str, Result] = {}
    while todo := [trial for trial in FULL.plan(results) if trial.name not in results]:
        for trial in todo:
            results[trial.name] = made_up(AdapterTrial.from_json(trial.spec), nats, english)
    return EXPERIMENT.report("full", results)


def made_up(trial: AdapterTrial, nats: dict[str, float], english: dict[str, float]) -> Result:
    def label(way: str) -> str:
        grid = trial.run and trial.run.grid
        return next(arm.label for arm in ARMS if arm.way == way and arm.grid == grid)

    shift = 0.001 * (trial.run.seed if trial.run else 0)
    worse = abs(math.log(trial.run.rate / 3e-2)) if trial.run else 0.0
    windows = {
        way: {
            name: [(english if name == "english" else nats).get(label(way), 4.0) + shift + worse + n for n in range(3)]
            for name in DOMAINS
        }
        for way in trial.ways
    }
    layer = {"bits": 0.5, "shuffled_bits": 0.1, "shuffled_std": 0.01}
    gate = {"n_live": 256, "dead_fraction": 0.1, "load_cv": 1.0, "load_max_over_mean": 3.0, "load_entropy_bits": 7.0}
    result: Result = {
        "nats": windows,
        "vocabulary": 5000,
        "gates": [gate],
        "specialisation": {way: [layer] for way in trial.ways},
        "shares": {"arrow-1": {name: [0.2, 0.3, 0.5] for name in DOMAINS}},
        "volunteer": {
            "parameters": 1, "memory_bytes": 1, "block_adapters": 1, "wire_bytes_per_token": 1.0, "share": 1.0,
        },
        "tokens": 1_000, "cpu_seconds": 10.0, "others_cpu_seconds": 5.0, "wire_bytes": 8_000_000, "calls_ok": 400,
        "calls_failed": 0,
    }  # fmt: skip
    return result


def test_the_finding_says_what_came_out_good_or_bad() -> None:
    apart = {arm.label: 3.75 for arm in ARMS if arm.way == "merged"} | {
        arm.label: 3.0 for arm in ARMS if arm.way == "own"
    }
    good = report({"8 of 1,024 adapters": 3.0, "one adapter for all": 3.5, **apart}, {"8 of 1,024 adapters": 3.9})
    assert good.finding.startswith("8 of 1,024 adapters are 0.500")
    assert "nats per token better than one adapter of equal active size" in good.finding
    assert "25% (merged)" in good.finding
    arrow_table = good.tables["Where Arrow sends tokens"]
    assert "| german | 20% | 30% | 50% |" in arrow_table
    assert "| 0.1 | 20% | 30% | 50% |" in arrow_table, "by rate, each domain to its own adapter"
    assert "0% (Arrow chooses 1)" in good.finding
    assert "Many are dead in: 8 of 256 adapters; 8 of 1,024 adapters" in good.tables["Load"]
    assert "perhaps not tuned" not in good.tables["Loss where the seed is weak"]

    assert "8 of 1,024 adapters that are held by 2 hosts are 0.000 nats per token worse" in good.finding
    hosted = "| 8 of 1,024 adapters, on 2 hosts | 4,096 | 0.000 | 400 | 0 | 2,000 | 1.50 |"
    assert hosted in good.tables["Held by hosts"]

    bad = report({"8 of 256 adapters": 3.8, "one adapter for all": 3.5}, {"8 of 256 adapters": 4.5})
    assert bad.finding.startswith("8 of 256 adapters are 0.300")
    assert "nats per token worse than one adapter of equal active size" in bad.finding
    assert "adapters that were trained apart learnt nothing" in bad.finding
    assert "on English they are 0.5" in bad.finding


def test_a_rate_at_an_end_of_those_tried_is_told() -> None:
    low = replace(FULL, rates=(3e-2, 1e-1))
    results: dict[str, Any] = {}
    while todo := [trial for trial in low.plan(results) if trial.name not in results]:
        for trial in todo:
            results[trial.name] = made_up(AdapterTrial.from_json(trial.spec), {}, {})
    told = AdaptersExperiment({"quick": low, "full": low}).report("full", results)
    assert "perhaps not tuned: one adapter for all" in told.tables["Loss where the seed is weak"]


def test_without_the_seed_one_sentence_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    (first,) = EXPERIMENT.plan("quick", {})
    with pytest.raises(ConfigError, match="is not installed: run `make setup-seed`") as caught:
        EXPERIMENT.run(first.spec, Context(tmp_path / "trial"))
    assert "\n" not in str(caught.value)


def test_a_report_before_the_first_result_says_what_makes_it() -> None:
    with pytest.raises(ConfigError, match="adapters: no result yet of the seed alone"):
        EXPERIMENT.report("full", {})
