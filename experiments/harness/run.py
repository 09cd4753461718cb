"""The command `experiment`: run an experiment's trials, then write its page, plots and JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from common.folders import FolderClaim, claimed, prepare_folder
from experiments.harness.catalogue import MODULES, load
from experiments.harness.page import publish
from experiments.harness.runner import Runner, RunnerConfig
from experiments.harness.store import ResultStore
from experiments.harness.view import View

if TYPE_CHECKING:
    import asyncio

    from coordinator.config import ExperimentConfig
    from experiments.harness.experiment import Experiment

RESULTS = Path("docs/results")


async def run_experiment(config: ExperimentConfig, stop: asyncio.Event) -> int | None:
    """Run one, or list them all."""
    if not config.name:
        _list(Console())
        return None
    experiment = load(config.name)
    folder = config.out / f"{config.name}-{config.preset}"
    with claimed(FolderClaim(folder=folder, role="experiment", flag="--out", lock="experiment.lock")):
        await _run(config, experiment, folder, stop)
    return None


async def _run(config: ExperimentConfig, experiment: Experiment, folder: Path, stop: asyncio.Event) -> None:
    console = Console()
    results = config.results or (RESULTS if config.preset == "full" else folder)
    prepare_folder(results)
    store = ResultStore(folder, results / f"{config.name}.json")
    with View(config.name, Console(stderr=True)) as view:
        runner = Runner(experiment, store, view, _runner_config(config))
        done = config.report or await runner.run(stop)
    if not done:
        console.print("Stopped; the same command goes on from here.")
    if done and (config.report or not config.only):
        page = publish(experiment, config.preset, runner.trials(), store, results)
        console.print(page.finding, highlight=False)
        console.print(f"{page.path} tells it whole.", highlight=False)


def _runner_config(config: ExperimentConfig) -> RunnerConfig:
    if config.jobs < 0 or config.threads < 1:
        raise ConfigError("--jobs, --threads: a number of jobs from 0 and of threads from 1")
    jobs = config.jobs or max(1, len(os.sched_getaffinity(0)) // config.threads)
    return RunnerConfig(
        module=MODULES[config.name],
        preset=config.preset,
        jobs=jobs,
        threads=config.threads,
        device=config.device,
        only=config.only,
    )


def _list(console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    for name in MODULES:
        grid.add_row(f"[bold]{name}[/]", load(name).claim)
    console.print(grid)
