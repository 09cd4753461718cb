"""Merges of adapters that were trained apart around a tiny seed, routing between them, and the page of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from experiments.adapters.adapting import AdapterGrid, AdapterRun, nats_per_window, train_apart
from experiments.adapters.apart import arrow
from experiments.adapters.domains import WEAK
from experiments.adapters.seed import TextPlan, Texts, open_texts
from experiments.merging.adapters import (
    ARROW_ALL,
    ARROW_ONE,
    EXPERIMENT,
    GATED,
    ONE_FOR_ALL,
    PRESETS,
    RATES,
    SEED_ALONE,
    TOLD,
    AroundSeed,
    parameters_of,
    run_trial,
    weights_of,
)
from experiments.merging.report import MERGES
from experiments.merging.search import POPULATION
from tests.support.tiny_domain import tiny_domain
from tests.support.tiny_pretrained import SHAPE, save_pretrained
from tests.support.trials import Context

if TYPE_CHECKING:
    from experiments.adapters.adapting import Adapters
    from experiments.adapters.domains import DomainName
    from experiments.harness.experiment import Result, Trial

TEXT = TextPlan(training=12, tuning=2, held_out=3, window_tokens=16, layers=2)
RUN = AdapterRun(grid=AdapterGrid(rank=4), layers=2, rate=3e-2, seed=0)
TRIES = 2 * POPULATION


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("trials") / "trial")


@pytest.fixture(scope="module")
def texts(context: Context) -> Texts:
    model = str(save_pretrained(context.folder.parent / "model"))
    return open_texts(model, tiny_domain, TEXT, context.shared, context.progress)


@pytest.fixture(scope="module")
def alone(texts: Texts, context: Context) -> dict[DomainName, Adapters]:
    return train_apart(RUN, texts.seed, texts.training, context.progress)


def carried_out(trial: Trial, texts: Texts, context: Context) -> Result:
    """As the runner would, with fewer windows and adapters of this seed's size."""
    spec = json.loads(json.dumps(trial.spec))
    few = {"experts": min(8, spec["run"]["grid"]["experts"]), "per_token": min(2, spec["run"]["grid"]["per_token"])}
    run = {**spec["run"], "layers": TEXT.layers, "grid": {**spec["run"]["grid"], "rank": 4, **few}}
    result: Result = json.loads(json.dumps(run_trial({**spec, "run": run, "evaluations": TRIES}, texts, context)))
    return result


@pytest.fixture(scope="module")
def results(texts: Texts, context: Context) -> dict[str, Result]:
    """Of a whole seed."""
    return {trial.name: carried_out(trial, texts, context) for trial in EXPERIMENT.plan("quick", {})}


@pytest.fixture(scope="module")
def apart(results: dict[str, Result]) -> Result:
    return results["further-seed0"]


def test_a_trial_measures_every_merge_and_every_way_between(apart: Result) -> None:
    ways = apart["ways"]
    assert {*MERGES, SEED_ALONE, ARROW_ONE, ARROW_ALL, TOLD} < set(ways)
    assert ways[TOLD]["nats"] < ways["average"]["nats"] < ways[SEED_ALONE]["nats"]
    assert ways["one, in hindsight"]["nats"] <= ways[TOLD]["nats"]
    assert ways["evolved by layer"]["evaluations"] == ways["random by layer"]["evaluations"] == TRIES
    assert ways["evolved by layer"]["chosen_nats"] <= ways["average"]["chosen_nats"]
    assert apart["tokens_of_evaluation"] == len(WEAK) * TEXT.tuning * TEXT.window_tokens


def test_an_adapters_product_does_what_the_adapter_does(texts: Texts, alone: dict[DomainName, Adapters]) -> None:
    measure = AroundSeed(texts)
    for adapters in alone.values():
        nats_NT = measure.nats(adapters.trunk)
        assert torch.allclose(-measure.log_likelihood(weights_of(adapters)), nats_NT, atol=1e-4)
    assert measure.owner_N.tolist() == [owner for owner in range(len(WEAK)) for _ in range(TEXT.held_out)]


def test_arrow_is_measured_on_the_same_windows(texts: Texts, alone: dict[DomainName, Adapters], apart: Result) -> None:
    trunk = arrow(texts.seed, list(alone.values()), 1)
    nats = np.mean([nats_per_window(trunk, texts.held_out[name]) for name in WEAK])
    assert apart["ways"][ARROW_ONE]["nats"] == pytest.approx(float(nats), abs=1e-4)


def test_what_is_trained_together_learns_from_every_domain(results: dict[str, Result], apart: Result) -> None:
    for kind in ("one-for-all", "8-of-256"):
        assert results[f"{kind}-seed0"]["tokens"] == len(WEAK) * TEXT.training * TEXT.window_tokens
        assert results[f"{kind}-seed0"]["nats"] < apart["ways"][SEED_ALONE]["nats"]


def test_the_weights_that_a_token_meets_are_those_of_the_adapted_layers_and_the_tokens_that_occur(texts: Texts) -> None:
    width, kept_heads = SHAPE["hidden_size"], SHAPE["num_key_value_heads"] / SHAPE["num_attention_heads"]
    layer = (2 + 2 * kept_heads) * width**2 + 3 * width * SHAPE["intermediate_size"]
    occurring = torch.cat(
        [ids_WT.flatten() for part in (texts.training, texts.tuning, texts.held_out) for ids_WT in part.values()]
    )
    assert parameters_of(texts.seed) == TEXT.layers * layer + len(occurring.unique()) * width


def test_a_page_speaks_of_tokens_and_holds_both_kinds_against_what_was_trained_on_all(
    results: dict[str, Result],
) -> None:
    report = EXPERIMENT.report("quick", results)
    assert report.finding.startswith("One seed cannot tell. Learnt at 0.03, the average is")
    for words in ("nats per token", "than the seed alone", "one adapter trained on all", "their gate", "Arrow, which"):
        assert words in report.finding
    assert "byte" not in report.finding + "".join(report.tables.values())
    for rate in RATES.values():
        table = report.tables[f"Loss, learnt at {rate:g}"]
        assert f"| {ONE_FOR_ALL} |" in table
        assert f"| {GATED} |" in table
        assert f"| {TOLD} |" in table
    assert "tokens run through a model" in report.tables["What it costs"]
    assert "| even ensemble | 0 | 0 | 0 | 0 | 3.00 |" in report.tables["What it costs"]
    assert set(report.figures) == {"ways", "search"}


def test_a_report_waits_for_a_whole_seed(results: dict[str, Result]) -> None:
    with pytest.raises(ConfigError, match="merging-adapters: no result yet of a whole seed"):
        EXPERIMENT.report("full", {name: row for name, row in results.items() if not name.startswith("less-far")})


def test_a_plan_holds_every_kind_with_every_seed_and_survives_json() -> None:
    trials = EXPERIMENT.plan("full", {})
    assert len({trial.name for trial in trials}) == len(trials) == 4 * PRESETS["full"].seeds
    for trial in trials:
        spec: dict[str, Any] = json.loads(json.dumps(trial.spec))
        assert asdict(TextPlan(**spec["text"])) == spec["text"]
        run = AdapterRun(**{**spec["run"], "grid": AdapterGrid(**spec["run"]["grid"])})
        assert asdict(run) == spec["run"]
        assert run.rate == RATES.get(spec["kind"], RATES["further"]), "what is trained together takes the higher rate"
