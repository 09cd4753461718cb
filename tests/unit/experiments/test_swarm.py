"""The swarm experiment's parts that need no process: what is counted, when hosts die, and what the page concludes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from common.errors import ConfigError, UnavailableError
from experiments.arms.counted import CountedExperts
from experiments.live.hosts import Churn, kill_steps
from experiments.live.placement import manifest_of
from experiments.swarm import experiment as swarm
from experiments.swarm.trial import curve
from node.model.pairs import NO_EXPERT, Combined

ARMS = list(swarm.places(0))
HERE = (swarm.ONE, swarm.ASYNC, swarm.FEWER, swarm.SLOWER)


class HalfThere:
    """Four experts of which two are live; the second choice of every token is not answered, one gradient is lost."""

    run_tokens = 0

    def live_experts(self, layer: int) -> torch.Tensor:
        return torch.tensor([True, True, False, False])

    def forward(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, keep: bool
    ) -> Combined:
        answered_TK = expert_ids_TK != NO_EXPERT
        answered_TK[:, 1] = False
        return Combined(x_TD, answered_TK, "theirs")

    def backward(self, ticket: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert ticket == "theirs"
        return grad_TD, torch.tensor([0.0, 0.0, 0.5, 0.0, 0.25, 0.0])


def test_pairs_are_counted_that_were_chosen_answered_and_came_back() -> None:
    counted = CountedExperts(HalfThere())
    counted.run_tokens = 5
    x_TD, ids_TK = torch.ones(3, 2), torch.tensor([[0, 1], [1, 0], [1, NO_EXPERT]])
    found = counted.forward(0, x_TD, ids_TK, torch.ones(3, 2), keep=True)
    _, weights = counted.backward(found.ticket, x_TD)
    assert weights.tolist() == [0.0, 0.0, 0.5, 0.0, 0.25, 0.0]
    assert counted.trained == {"chosen": 5, "answered": 3, "returned": 2, "experts": 4, "live": 2}
    assert not counted.held_out

    counted.forward(0, x_TD, ids_TK, torch.ones(3, 2), keep=False)
    assert counted.held_out == {"chosen": 5, "answered": 3, "experts": 4, "live": 2}
    assert counted.run_tokens == 5


@dataclass
class FakeHosts:
    joined: bool = True
    replaced: list[int] = field(default_factory=list)
    error: Exception | None = None

    def __len__(self) -> int:
        return 4

    def replace(self, index: int) -> None:
        if self.error:
            raise self.error
        self.replaced.append(index)

    def has_joined(self, index: int) -> bool:
        return self.joined


class AtOnce:
    """A pool that is done before it returns."""

    def submit(self, function: Any, *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            function(*arguments)
            future.set_result(None)
        except UnavailableError as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool) -> None:
        """Nothing runs."""


def churn_of(hosts: Any, due: list[int], seed: int = 0) -> Churn:
    churn = Churn(hosts, due, seed)
    churn._pool.shutdown()
    churn._pool = AtOnce()  # type: ignore[assignment]
    return churn


def test_a_host_dies_at_each_step_that_is_due_and_the_seed_says_which() -> None:
    hosts, again, other = FakeHosts(), FakeHosts(), FakeHosts()
    for seed, each in ((0, hosts), (0, again), (1, other)):
        churn = churn_of(each, [2, 4, 5, 6, 7], seed)
        counts = []
        for step in range(9):
            churn.before_step(step)
            counts.append(len(each.replaced))
        assert counts == [0, 0, 1, 1, 2, 3, 4, 5, 5]
    assert hosts.replaced == again.replaced != other.replaced


def test_the_next_kill_waits_until_the_last_one_has_joined() -> None:
    hosts = FakeHosts()
    churn = churn_of(hosts, [1, 2])
    churn.before_step(1)
    hosts.joined = False
    for step in (2, 3):
        churn.before_step(step)
    assert len(hosts.replaced) == 1
    hosts.joined = True
    churn.before_step(4)
    assert len(hosts.replaced) == 2
    churn.finish()


def test_a_host_that_cannot_be_started_again_ends_the_trial() -> None:
    churn = churn_of(FakeHosts(error=UnavailableError("no room")), [0])
    churn.before_step(0)
    with pytest.raises(UnavailableError, match="no room"):
        churn.finish()


def test_kills_are_spread_and_neither_first_nor_last() -> None:
    assert kill_steps(96, 5) == [16, 32, 48, 64, 80]
    assert kill_steps(96, 0) == []


def test_the_curve_has_the_mean_loss_of_each_part_and_ends_at_the_last_token() -> None:
    assert curve([4.0, 2.0], 10) == [(10, 4.0), (20, 2.0)]
    long = curve([float(loss) for loss in range(33)], 10)
    assert long[0] == (20, 0.5)
    assert long[-1] == (330, 32.0)


def test_all_arms_learn_the_same_from_the_same_start_and_only_swarms_have_hosts() -> None:
    trials = swarm.EXPERIMENT.plan("full", {})
    assert len(trials) == 3 * len(ARMS)
    assert all(trial.alone for trial in trials)
    first = {trial.spec["train"]["arm"]["label"]: trial.spec for trial in trials[: len(ARMS)]}
    trains = [{**spec["train"], "arm": {**spec["train"]["arm"], "label": ""}} for spec in first.values()]
    rates = {label: train.pop("expert_lr") for label, train in zip(first, trains, strict=True)}
    assert all(train == trains[0] for train in trains)
    assert {label for label, rate in rates.items() if rate != swarm.RATE} == {swarm.SLOWER}
    assert [label for label, spec in first.items() if not spec["place"]["hosts"]] == list(HERE)
    worst = first[swarm.ALL]["place"]
    assert worst["replicas"] == 2
    assert min(worst["delay_mean_s"], worst["fail"], worst["kills"]) > 0


def test_manifests_differ_in_replicas_alone() -> None:
    spec = swarm._spec("an arm", 3, swarm.FULL)
    one, two = (manifest_of(spec, swarm.places(0)[label]) for label in (swarm.ONE, swarm.TWICE))
    assert (one.model, one.optimizer, one.seed, one.codec) == (two.model, two.optimizer, two.seed, "fp32")
    assert (one.averaging.target_replicas, two.averaging.target_replicas) == (1, 2)
    assert one.model.blocks_per_layer == swarm.HOSTS


def result(nats: float, label: str) -> dict[str, Any]:
    gate = {"n_live": 8, "dead_fraction": 0.0, "load_cv": 0.1, "load_max_over_mean": 1.1, "load_entropy_bits": 2.9}
    layer = {"bits": 0.5, "shuffled_bits": 0.1, "shuffled_std": 0.01}
    pairs = {"chosen": 100, "answered": 98, "returned": 49, "experts": 64, "live": 32}
    calls = {
        "calls_ok": 90, "calls_failed": 10, "wire_bytes": 2_000_000, "waits": 2, "kills": 1, "staleness_mean": 1.5,
        "staleness_max": 4, "exchanges": 7, "exchanged_bytes": 3_000_000, "divergence_mean": 0.01,
        "divergence_max": 0.125,
    }  # fmt: skip
    return {
        "nats_per_byte": nats, "window_nats": [nats - 0.01, nats + 0.01], "train": [(50, nats + 1), (100, nats)],
        "tokens": 100, "seconds": 2.0, "cpu_seconds": 1.0, "others_cpu_seconds": 0.0 if label == swarm.ONE else 3.0,
        "pairs": pairs, "gates": [gate], "specialisation": {"byte class": [layer], "topic": [layer]},
        **({} if label in HERE else calls),
    }  # fmt: skip


def report(nats: dict[str, list[float]]) -> Any:
    results = {}
    for trial in swarm.EXPERIMENT.plan("full", {}):
        train = trial.spec["train"]
        label = train["arm"]["label"]
        results[trial.name] = result(nats.get(label, [2.0, 2.0, 2.0])[train["seed"]], label)
    return swarm.EXPERIMENT.report("full", results)


def test_the_finding_follows_the_results_whichever_they_are() -> None:
    near = report({swarm.ALL: [2.010, 2.011, 2.009]})
    assert near.finding.startswith("It is not far in loss: after 196,608 tokens a swarm whose calls are late and fail")
    assert "die differs by +0.010 ± 0.002 nats per byte from one process" in near.finding
    assert "takes 4.0 times the processor time, and sends 10.0 kB for a token and layer" in near.finding
    late = report(
        {
            swarm.ASYNC: [2.3, 2.31, 2.29],
            swarm.TWICE: [2.4, 2.41, 2.39],
            swarm.IN_TURN: [2.1, 2.11, 2.09],
            swarm.FEWER: [2.2, 2.21, 2.19],
        }
    )
    for words in (
        "disturbs by +0.400 ±",
        "without late gradients by +0.100 ±",
        "with late gradients differs by +0.300 ±",
        "two at once by +0.200 ±",
        "experts at half the rate by 0.000.",
    ):
        assert words in late.finding
    assert report({swarm.ALL: [2.5, 2.51, 2.49]}).finding.startswith("It is far in loss: ")
    unknown = report({swarm.ALL: [2.1, 2.0, 1.95]}).finding
    assert unknown.startswith("It is not known whether it is within 0.02 nats per byte")


def test_the_tables_tell_what_did_not_happen_and_leave_out_what_does_not_apply() -> None:
    tables = report({}).tables
    calls = {line.split(" | ")[0].removeprefix("| "): line for line in tables["Calls and experts"].splitlines()}
    assert calls[swarm.ALL].endswith("| 100 | 10.0% | 1.0 | 2.0 | 50.00% | 2.00% | 50.00% |")
    assert calls[swarm.ONE].startswith(f"| {swarm.ONE} | - | - | - | - | 50.00% |")
    assert "| 1.50 | 4.0 | 7 | 3 | 1.0% | 12.5% |" in tables["Late gradients and replicas apart"]
    assert "| 10,000 | 30,000 | 4.00 | 10,000 | 50 | 1.00 |" in tables["What it costs"]
    assert set(tables) >= {"Loss", "Load", "Specialisation"}


def test_a_report_without_every_arm_says_what_to_run() -> None:
    with pytest.raises(ConfigError, match=r"swarm: no result yet of one process; .*--preset quick makes it"):
        swarm.EXPERIMENT.report("quick", {})
