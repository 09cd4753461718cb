"""A trial of the swarm experiment: real hosts, calls that are late and fail, a host that dies; and one that is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import pytest

from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.training import nats_per_window
from experiments.harness.worker import Failure, Job, TrialProgress, Worker
from experiments.live.placement import Placement, experts_at, manifest_of
from experiments.live.processes import wait_until
from experiments.swarm import experiment as swarm
from experiments.swarm.trial import SwarmTrial
from tests.support.trials import Context, bee_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from node.data import TextDataset

SPEC = TrainSpec(
    arm=Arm(label="2 of 8 experts", hidden=8, experts=8, per_token=2), seed=3, tokens=40 * 256, lr=1e-2,
    expert_lr=1e-2, d_model=16, layers=2, heads=2, context=16, batch=16, final_eval_bytes=1024,
)  # fmt: skip
HERE = Placement(experts_per_block=4)
DISTURBED = Placement(hosts=2, replicas=2, experts_per_block=4, in_flight=4, delay_mean_s=0.01, fail=0.1, kills=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return bee_dataset(tmp_path_factory.mktemp("data"))


def trained(place: Placement, dataset: TextDataset, folder: Path) -> tuple[dict[str, Any], float]:
    """What training told, and the held-out loss once nothing is disturbed any more."""
    folder.mkdir()
    context = Context(folder)
    with experts_at(place, manifest_of(SPEC, place), SPEC.steps, folder) as where:
        trial = SwarmTrial(SPEC, place, where, dataset)
        told = trial.train(context)
        where.settle()
        nats = float(nats_per_window(trial.model.trunk, dataset, SPEC, SPEC.final_eval_bytes).mean())
        assert trial.experts.held_out["answered"] == trial.experts.held_out["chosen"] > 0
    assert context.told == SPEC.steps // 4
    assert not list(folder.iterdir()), "the swarm's folder is gone"
    return told, nats


def test_a_swarm_whose_calls_fail_and_whose_host_dies_learns_what_one_process_learns(
    tmp_path: Path, dataset: TextDataset
) -> None:
    here, nats_here = trained(HERE, dataset, tmp_path / "here")
    told, nats = trained(DISTURBED, dataset, tmp_path / "swarm")
    assert told["tokens"] == here["tokens"] == SPEC.steps * 256
    assert told["kills"] == 1
    assert told["calls_failed"] > 0.05 * told["calls_ok"]
    assert told["staleness_max"] > 0
    assert told["wire_bytes"] > 2 * 4 * 16 * told["tokens"]
    assert told["others_cpu_seconds"] > 0
    assert told["pairs"]["answered"] > 0.9 * told["pairs"]["chosen"]
    assert here["pairs"]["returned"] == here["pairs"]["chosen"]
    assert nats == pytest.approx(nats_here, rel=0.15)
    assert max(nats, nats_here) < here["train"][0][1] - 1


@pytest.mark.slow
def test_a_trial_that_is_cut_leaves_no_process_behind(tmp_path: Path) -> None:
    trial = next(t for t in swarm.EXPERIMENT.plan("quick", {}) if t.spec["train"]["arm"]["label"] == swarm.ALL)
    folder, shared = str(tmp_path / "own"), str(tmp_path / "shared")
    (tmp_path / "own").mkdir()
    job = Job(
        module="experiments.swarm.experiment", spec=trial.spec, folder=folder, shared=shared, device="cpu", threads=1
    )
    worker = Worker(trial, job)
    try:
        assert worker.connection.poll(90), "it trains"
        said = worker.connection.recv()
        assert isinstance(said, TrialProgress), said.words if isinstance(said, Failure) else said
        below = psutil.Process(worker.pid).children(recursive=True)
    finally:
        worker.stop()
    assert len(below) > swarm.HOSTS, "hosts, a coordinator, and daemons"
    wait_until(lambda: not any(map(runs, below)), "every node and its daemon has ended", 20)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
