"""Trials in processes of their own: stages, resuming, failures, Ctrl+C; and a real training run, cut and resumed."""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from coordinator.config import ExperimentConfig
from experiments.arms.arm import Arm, TrainSpec
from experiments.arms.training import TrainRun, result_of
from experiments.harness import catalogue
from experiments.harness.page import publish
from experiments.harness.run import run_experiment
from experiments.harness.runner import Runner, RunnerConfig, TrialsFailedError
from experiments.harness.store import ResultStore
from experiments.harness.view import View
from tests.support import small_experiment
from tests.support.small_experiment import Small
from tests.support.trials import Context, bee_dataset

if TYPE_CHECKING:
    from experiments.harness.experiment import Trial
    from experiments.harness.worker import TrialProgress
    from node.data import TextDataset

CONFIG = RunnerConfig(module=small_experiment.__name__, preset="quick", jobs=2, threads=1, device="cpu", only="")


@dataclass
class Seen(View):
    """A view that remembers which trials were started, and sets `stop` once one has said `stop_at`."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_at: str = ""

    def __post_init__(self) -> None:
        self.written = io.StringIO()
        super().__init__("small", Console(file=self.written))
        self.names: list[str] = []
        self.running: set[str] = set()
        self.most_at_once = 0

    def started(self, trial: Trial) -> None:
        self.names.append(trial.name)
        self.running.add(trial.name)
        self.most_at_once = max(self.most_at_once, len(self.running))
        super().started(trial)

    def ended(self, trial: Trial, *, has_result: bool) -> None:
        self.running.remove(trial.name)
        super().ended(trial, has_result=has_result)

    def progress(self, trial: Trial, said: TrialProgress) -> None:
        super().progress(trial, said)
        if self.stop_at and said.words == self.stop_at:
            self.stop.set()


async def run(folder: Path, experiment: Small, view: Seen | None = None) -> tuple[bool, Seen, ResultStore]:
    view = view or Seen()
    store = ResultStore(folder, folder / "small.json")
    with view:
        done = await Runner(experiment, store, view, CONFIG).run(view.stop)
    return done, view, store


async def test_a_plan_with_stages_is_run_to_its_end_and_not_run_again(tmp_path: Path) -> None:
    done, view, store = await run(tmp_path, Small())
    assert done
    assert sorted(view.names[:2]) == ["square-2", "square-3"]
    assert view.names[2:] == ["sum"]
    assert view.most_at_once == CONFIG.jobs
    assert store.all()["sum"] == {"value": 13, "left": ["2", "3"]}, "it finds what earlier trials have left"
    assert not list((tmp_path / "unfinished").iterdir())

    done, view, _ = await run(tmp_path, Small())
    assert done
    assert view.names == []


async def test_a_trial_computes_with_the_threads_that_it_is_given(tmp_path: Path) -> None:
    _, _, store = await run(tmp_path, Small(kinds=("threads",)))
    assert store.all()["threads-2"] == {"value": CONFIG.threads}


async def test_a_trial_that_runs_alone_has_no_other_beside_it(tmp_path: Path) -> None:
    done, view, _ = await run(tmp_path, Small(alone=True))
    assert done
    assert view.most_at_once == 1


async def test_a_trial_whose_spec_has_changed_is_run_again(tmp_path: Path) -> None:
    await run(tmp_path, Small())
    path = tmp_path / "trials" / "square-2.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "spec": {**row["spec"], "n": 5}}))

    _, view, store = await run(tmp_path, Small())
    assert view.names == ["square-2"]
    assert store.all()["square-2"] == {"value": 4}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("fails", "there is no 2"), ("breaks", "ZeroDivisionError"), ("dies", "its process ended with code 7")],
)
async def test_a_trial_that_fails_is_told_and_the_others_keep_their_results(
    tmp_path: Path, kind: str, words: str
) -> None:
    with pytest.raises(TrialsFailedError, match="2 trials have no result") as caught:
        await run(tmp_path, Small(kinds=(kind, "square")), view := Seen())
    assert words in str(caught.value)
    assert f"{kind}-2: no result" in view.written.getvalue()
    store = ResultStore(tmp_path, tmp_path / "small.json")
    assert store.all() == {"square-2": {"value": 4}, "square-3": {"value": 9}}


async def test_a_stop_ends_every_worker_within_three_seconds_and_a_trial_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    view = Seen(stop_at="waiting")
    running = asyncio.create_task(run(tmp_path, Small(kinds=("waits",)), view))
    await asyncio.wait_for(view.stop.wait(), 60)
    asked = time.monotonic()
    done, _, store = await running
    assert not done
    assert time.monotonic() - asked < 3
    assert multiprocessing.active_children() == []
    assert store.all() == {}

    # What it left makes it end at once; the other one has left the same by the second start at the latest.
    for _ in range(2):
        view = Seen(stop_at="waiting")
        done, _, store = await run(tmp_path, Small(kinds=("waits",)), view)
        if done:
            break
    assert done
    assert store.all()["sum"]["value"] == 0


STOPPED = """
import sys
from experiments.harness.worker import Job, Worker
from tests.support import small_experiment

if __name__ == "__main__":
    trial = small_experiment.Small(kinds=("waits",)).plan("quick", {})[0]
    job = Job(module=small_experiment.__name__, spec=trial.spec, folder=sys.argv[1], shared=sys.argv[1], device="cpu",
              threads=1)
    worker = Worker(trial, job)
    while worker.connection.recv().words != "waiting":
        pass
    worker.stop()
"""


def test_a_trial_that_is_stopped_leaves_no_semaphores_behind_and_its_user_no_warning(tmp_path: Path) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    root = str(Path(small_experiment.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "trial")],
        env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""


async def test_the_page_json_and_plots_are_the_same_bytes_each_time_and_the_json_resumes(tmp_path: Path) -> None:
    _, _, store = await run(tmp_path / "run", Small())
    trials = Small().plan("quick", store.all())
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pages.append(publish(Small(), "quick", trials, store, tmp_path / name))
    one, two = ([page.path.read_bytes(), page.path.with_name("small_line.svg").read_bytes()] for page in pages)
    assert one == two
    assert pages[0].finding == "The sum is 13."
    assert "which holds 3 of 3 trials" in pages[0].path.read_text()

    published = ResultStore(tmp_path / "elsewhere", tmp_path / "one" / "small.json")
    assert published.results(trials) == store.results(trials)
    lines = (tmp_path / "one" / "small.json").read_text().splitlines()
    rows = [line for line in lines if '"result"' in line]
    assert len(rows) == 3, "a line for each trial"


async def test_the_command_runs_writes_and_then_only_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(catalogue.MODULES, "small", small_experiment.__name__)
    config = ExperimentConfig(name="small", out=tmp_path / "out", results=tmp_path / "docs", jobs=1)
    assert await run_experiment(config, asyncio.Event()) is None
    out = capsys.readouterr().out
    assert "The sum is 13." in out
    page = tmp_path / "docs" / "small.md"
    assert page.read_text().startswith("# Small\n\n**The sum is 13.**")

    page.unlink()
    monkeypatch.setattr(Runner, "run", None)  # reporting runs nothing
    again = ExperimentConfig(name="small", out=tmp_path / "out", results=tmp_path / "docs", report=True)
    assert await run_experiment(again, asyncio.Event()) is None
    assert page.exists()


ARM = Arm(label="2 of 8 experts", hidden=8, experts=8, per_token=2)
SPEC = TrainSpec(
    arm=ARM, seed=3, tokens=2_000, lr=4e-3, expert_lr=4e-3, d_model=16, layers=2, heads=2, context=16, batch=4,
    evaluations=3, eval_bytes=256, final_eval_bytes=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return bee_dataset(tmp_path_factory.mktemp("data"))


def test_a_training_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path, dataset: TextDataset) -> None:
    whole = TrainRun(SPEC, Context(tmp_path / "whole"), dataset)
    whole.go()
    assert len(whole.log.held_out) == SPEC.evaluations
    assert whole.log.held_out[-1][1] < whole.log.held_out[0][1]

    cut = TrainRun(SPEC, Context(tmp_path / "cut"), dataset)
    for _ in range(10):
        cut.training.step()
    cut.log.held_out.append((0, 0.0))
    cut.save()
    cut.training.close()
    again = TrainRun(SPEC, Context(tmp_path / "cut"), dataset)
    again.go()

    assert again.log.held_out[0] == (0, 0.0), "its log goes on"
    assert again.log.held_out[-1] == whole.log.held_out[-1]
    for layer, blocks in whole.model.experts.blocks.items():
        for one, other in zip(blocks, again.model.experts.blocks[layer], strict=True):
            assert all(one.params[name].equal(other.params[name]) for name in one.params)


def test_a_dense_run_needs_no_experts_and_resumes_too(tmp_path: Path, dataset: TextDataset) -> None:
    spec = TrainSpec.from_json({**SPEC.to_json(), "arm": {"label": "dense", "hidden": 16}})
    run = TrainRun(spec, Context(tmp_path / "own"), dataset)
    run.go()
    run.save()
    again = TrainRun(spec, Context(tmp_path / "own"), dataset)
    again.go()
    one, other = result_of(run, dataset), result_of(again, dataset)
    assert (
        one["nats_per_byte"]
        == other["nats_per_byte"]
        == pytest.approx(sum(one["window_nats"]) / len(one["window_nats"]), abs=1e-4)
    )
    assert one["gates"] == []
