"""Runs the trials of an experiment, a few at a time, until its plan names nothing new."""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from common.errors import KilohiveError
from experiments.harness.worker import Failure, Job, TrialProgress, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.harness.experiment import Experiment, Preset, Result, Trial
    from experiments.harness.store import ResultStore
    from experiments.harness.view import View

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Longest wait for news from workers before the stop event is looked at."""


class TrialsFailedError(KilohiveError):
    """Trials have no result; those that have are kept."""


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How trials are run; see ExperimentConfig. `module` holds the experiment, for the workers."""

    module: str
    preset: Preset
    jobs: int
    threads: int
    device: str
    only: str


class Runner:
    """Belongs to the event loop; waits for workers on a thread."""

    def __init__(self, experiment: Experiment, store: ResultStore, view: View, config: RunnerConfig) -> None:
        self._experiment, self._store, self._view, self._config = experiment, store, view, config
        self._workers: dict[object, Worker] = {}
        self._failed: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> bool:
        """Run what has no result yet; False if stopped before the plan was done. Raises TrialsFailedError."""
        try:
            while not stop.is_set():
                todo = self._todo()
                self._view.plan(len(self._wanted()), len(todo))
                self._start([trial for trial in todo if trial.name not in self._running])
                if not self._workers:
                    break
                await self._hear()
        finally:
            for worker in self._workers.values():
                worker.stop()
        if self._failed:
            words = "; ".join(f"{name}: {why.strip().splitlines()[-1]}" for name, why in self._failed.items())
            count = "1 trial has" if len(self._failed) == 1 else f"{len(self._failed)} trials have"
            raise TrialsFailedError(f"{count} no result: {words}")
        return not stop.is_set()

    def trials(self) -> Sequence[Trial]:
        """All that can be named so far."""
        return self._experiment.plan(self._config.preset, self._store.all())

    def _wanted(self) -> list[Trial]:
        return [trial for trial in self.trials() if self._config.only in trial.name]

    @property
    def _running(self) -> set[str]:
        return {worker.trial.name for worker in self._workers.values()}

    def _todo(self) -> list[Trial]:
        return [trial for trial in self._wanted() if not self._store.has(trial) and trial.name not in self._failed]

    def _start(self, waiting: Sequence[Trial]) -> None:
        config = self._config
        for trial in waiting:
            if not self._has_room_for(trial):
                return
            job = Job(
                module=config.module,
                spec=trial.spec,
                folder=str(self._store.scratch(trial)),
                shared=str(self._store.shared),
                device=config.device,
                threads=config.threads,
            )
            worker = Worker(trial, job)
            self._workers[worker.connection] = worker
            self._view.started(trial)

    def _has_room_for(self, trial: Trial) -> bool:
        if trial.alone or any(worker.trial.alone for worker in self._workers.values()):
            return not self._workers
        return len(self._workers) < self._config.jobs

    async def _hear(self) -> None:
        ready = await asyncio.to_thread(wait, [worker.connection for worker in self._workers.values()], LOOK_S)
        for connection in ready:
            worker = self._workers[connection]
            try:
                said: TrialProgress | Result | Failure = worker.connection.recv()
            except EOFError:
                said = Failure(worker.exit_words())
            if isinstance(said, TrialProgress):
                self._view.progress(worker.trial, said)
            else:
                self._end(worker, said)

    def _end(self, worker: Worker, said: Result | Failure) -> None:
        del self._workers[worker.connection]
        worker.end()
        trial = worker.trial
        if isinstance(said, Failure):
            self._failed[trial.name] = said.words
            logger.error("Trial %s failed: %s", trial.name, said.words)
        else:
            self._store.keep(trial, said)
            shutil.rmtree(self._store.scratch(trial), ignore_errors=True)
        self._view.ended(trial, has_result=not isinstance(said, Failure))
