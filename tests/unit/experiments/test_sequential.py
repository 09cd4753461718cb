"""The sequential experiment: updates are measured as the whole model would, and the report follows the results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from experiments.arms.arm import Arm, TrainSpec
from experiments.sequential.experiment import EXPERIMENT, run_trial
from experiments.sequential.one_expert import OneExpert, expert_loads, reached_by, trained_further, trained_model
from experiments.sequential.report import sequential_report
from experiments.sequential.updates import KINDS, STEPS, Workshop, rate_bound, stops_by_peeking
from node.trainer.train_step import mean_nats
from tests.support.trials import Context, bee_dataset

if TYPE_CHECKING:
    from experiments.arms.training import Model
    from experiments.sequential.one_expert import Reached
    from node.data import TextDataset

ARM = Arm(label="2 of 8 experts", hidden=16, experts=8, per_token=2)
TRAIN = TrainSpec(
    arm=ARM, seed=0, tokens=20_480, lr=5e-3, expert_lr=5e-3, d_model=16, layers=2, heads=2, context=16, evaluations=1
)
SPEC: dict[str, Any] = {"train": TRAIN.to_json(), "update_seeds": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return bee_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("trials") / "trial")


@pytest.fixture(scope="module")
def trained(dataset: TextDataset, context: Context) -> Model:
    return trained_model(TRAIN, dataset, context)


@pytest.fixture(scope="module")
def workshop(trained: Model, dataset: TextDataset) -> Workshop:
    busiest = int(expert_loads(trained, dataset.held_out_batches(64, 16)).argmax())
    expert = OneExpert(trained, busiest)
    (text,) = reached_by(trained, [expert], training(dataset))
    (held_out,) = reached_by(trained, [expert], dataset.held_out_batches(64, 16))
    return Workshop(expert, text, held_out)


def training(dataset: TextDataset) -> list[torch.Tensor]:
    return [dataset.train_batch(n, shard=0, n_shards=1, batch=64, context=16, seed=1) for n in range(8)]


def whole_model_gain(
    trained: Model, dataset: TextDataset, expert: OneExpert, offered: dict[str, torch.Tensor]
) -> float:
    block = next(b for b in trained.experts.blocks[1] if expert.index in b.experts)
    place = expert.index - block.experts.start
    before = mean_nats(trained.trunk, dataset.held_out_batches(64, 16), CPU)
    for name, tensor in offered.items():
        block.params[name][place] = tensor
    after = mean_nats(trained.trunk, dataset.held_out_batches(64, 16), CPU)
    for name, tensor in expert.weights.items():
        block.params[name][place] = tensor
    return before - after


def test_an_updates_gain_is_what_the_whole_model_gains(
    trained: Model, dataset: TextDataset, workshop: Workshop
) -> None:
    offered = trained_further(workshop.expert, workshop.text, steps=100, lr=1e-2, seed=0)
    gain = workshop.expert.gains(workshop.held_out, offered).mean()
    assert abs(gain) > 1e-3
    assert gain == pytest.approx(whole_model_gain(trained, dataset, workshop.expert, offered), abs=1e-5)


def test_an_expert_that_stays_as_it_is_gains_exactly_nothing(workshop: Workshop) -> None:
    assert not workshop.expert.gains(workshop.held_out, workshop.expert.weights).any()


def test_windows_without_a_token_for_the_expert_do_not_change(workshop: Workshop) -> None:
    reached = reached_windows(workshop.held_out)
    offered = {name: tensor + 1.0 for name, tensor in workshop.expert.weights.items()}
    gains = workshop.expert.gains(workshop.held_out, offered)
    assert not gains[~reached].any()
    assert gains[reached].all()


def reached_windows(text: Reached) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.bincount(text.window_P, minlength=text.n_windows) > 0


def test_more_training_of_one_expert_lowers_the_loss_of_its_tokens(workshop: Workshop) -> None:
    offered = trained_further(workshop.expert, workshop.text, steps=50, lr=1e-2, seed=0)
    shuffled = trained_further(workshop.expert, workshop.text, steps=50, lr=1e-2, seed=0, shuffled=True)
    loss, better, worse = (
        float(workshop.expert.losses(workshop.text, weights).detach().mean())
        for weights in (workshop.expert.weights, offered, shuffled)
    )
    assert better < loss < worse


def test_updates_come_in_every_kind_and_a_stretched_one_gains_nothing(workshop: Workshop) -> None:
    updates = list(workshop.updates(1))
    assert [(u.steps, u.kind) for u in updates] == [(steps, kind) for steps in STEPS for kind in KINDS]
    stretched = [u.gains.mean() for u in updates if u.kind == "overstepped"]
    trained = [u.gains.mean() for u in updates if u.kind == "trained"]
    assert max(stretched) <= 0.0
    assert max(trained) > 0.0
    assert np.median(np.abs(stretched)) < np.median(np.abs(trained))


def test_a_trial_that_was_cut_goes_on_with_the_model_that_it_had_trained(
    trained: Model, dataset: TextDataset, context: Context
) -> None:
    told = context.told
    again = trained_model(TRAIN, dataset, context)
    assert context.told == told
    assert again.trunk.state_dict().keys() == trained.trunk.state_dict().keys()
    texts = [mean_nats(one.trunk, dataset.held_out_batches(64, 16), CPU) for one in (trained, again)]
    assert texts[0] == texts[1]


def test_a_trial_tells_each_update_and_its_result_is_json(
    trained: Model, dataset: TextDataset, context: Context
) -> None:
    result = json.loads(json.dumps(run_trial(SPEC, trained, dataset, context)))
    assert len(result["updates"]) == 3 * len(STEPS) * len(KINDS)
    assert {u["verdict"] for u in result["updates"]} <= {"accept", "reject"}
    tested = [u for u in result["updates"] if "became worse" not in u["why"]]
    assert tested
    assert all(64 < u["windows"] <= result["windows"] for u in tested)
    report = sequential_report([result])
    assert report.finding.startswith("It is not known")  # far fewer than 200 updates without gain
    assert "| overall" not in report.tables["False accepts"]


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_a_plans_trials_are_json_and_have_names_of_their_own(preset: Any) -> None:
    trials = EXPERIMENT.plan(preset, {})
    assert json.loads(json.dumps([trial.spec for trial in trials])) == [trial.spec for trial in trials]
    assert len({trial.name for trial in trials}) == len(trials)


def update(gain: float, verdict: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "trained" if gain > 0 else "noise",
        "gain": gain,
        "worth": 1e-5,
        "verdict": verdict,
        "without_worth": verdict,
        "why": "",
        "windows": 100,
        "tokens_reached": 50,
        "touched": {"verdict": verdict, "windows": 90, "of": 900},
        "peeking": None,
        **changes,
    }


def result(*updates: dict[str, Any]) -> dict[str, Any]:
    return {"bits_per_byte": 2.0, "experts": 64, "context": 128, "windows": 1000, "updates": list(updates)}


def test_the_report_says_it_can_where_few_nulls_are_accepted_and_gains_are_found_early() -> None:
    nulls = [update(-1e-6, "accept"), *[update(-1e-6, "reject")] * 199]
    report = sequential_report([result(*nulls, *[update(1e-4, "accept")] * 10)])
    assert report.finding.startswith("It can: 1 of 200 updates without gain were accepted (0.5%), and 10 of 10")
    assert "10 of these within half of the held-out text (median 10%)" in report.finding


def test_the_report_says_it_cannot_where_more_than_one_null_in_twenty_is_accepted() -> None:
    nulls = [*[update(-1e-6, "accept")] * 11, *[update(-1e-6, "reject")] * 189]
    finding = sequential_report([result(*nulls, update(1e-4, "accept"))]).finding
    assert finding == "It cannot: 11 of 200 updates without gain were accepted, 5.5%, more than 5%."


def test_rejecting_for_lack_of_worth_does_not_hide_false_accepts() -> None:
    nulls = [update(-1e-6, "reject", without_worth="accept")] * 200
    assert sequential_report([result(*nulls)]).finding.startswith("It cannot: 200 of 200")


def test_the_report_says_it_hardly_can_where_gains_are_not_found() -> None:
    updates = [*[update(-1e-6, "reject")] * 200, *[update(1e-4, "reject")] * 10]
    assert sequential_report([result(*updates)]).finding.startswith("It hardly can: ")


def test_gains_that_are_found_only_at_the_end_of_the_text_count_as_hardly_found() -> None:
    updates = [*[update(-1e-6, "reject")] * 200, *[update(1e-4, "accept", windows=1000)] * 10]
    report = sequential_report([result(*updates)])
    assert report.finding.startswith("It hardly can: 0 of 200")
    assert "| 0.0% | 0.0% | 100.0% |" in report.tables["Power, and tokens to a decision, by true gain"]


def test_the_bound_of_a_rate_is_the_exact_one() -> None:
    assert rate_bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200), rel=1e-6)
    assert rate_bound(5, 200) == pytest.approx(0.0519, abs=2e-4)
    assert rate_bound(3, 3) == 1.0


def test_peeking_stops_at_the_first_window_that_looks_good() -> None:
    gains = np.array([-1.0, 1.0] * 5 + [1.0] * 20)
    assert stops_by_peeking(-gains, 2) is None
    stop = stops_by_peeking(gains, 2)
    assert stop is not None
    assert 11 < stop < 20
