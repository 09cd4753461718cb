"""A trial in a process of its own: what it runs, and how the runner hears of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.allocator import keep_all_memory
from common.errors import KilohiveError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from types import FrameType

    from experiments.harness.experiment import Result, Trial

STOP_S = 2.0
"""How long a worker that is asked to end may take before it is killed."""


class TrialProgress(NamedTuple):
    """How far a trial is."""

    done: float
    total: float
    words: str


class Failure(NamedTuple):
    """Why a trial has no result."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told."""

    module: str
    spec: dict[str, Any]
    folder: str
    shared: str
    device: str
    threads: int


class Worker:
    """A running trial. Its connection yields TrialProgress, then a Result or a Failure."""

    def __init__(self, trial: Trial, job: Job) -> None:
        self.trial = trial
        # Spawned, not forked: torch's threads and gRPC do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The id of its process."""
        return self._process.pid

    def end(self) -> None:
        """Let it end by itself, as it has said its last: ended from outside it would leave semaphores behind."""
        self._process.join(STOP_S)
        self.stop()

    def stop(self) -> None:
        """End it; a trial that is cut goes on from its last checkpoint."""
        self._process.terminate()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_S)
        self.connection.close()

    def exit_words(self) -> str:
        """Say how a process ended that said nothing more."""
        self._process.join(STOP_S)
        return f"its process ended with code {self._process.exitcode}"


class Context:
    """A trial's context; see `experiments.harness.experiment.TrialContext`."""

    def __init__(self, job: Job, connection: Connection) -> None:
        self.folder, self.shared, self.device = Path(job.folder), Path(job.shared), job.device
        self._connection, self._parent = connection, os.getppid()

    def progress(self, done: float, total: float, words: str) -> None:
        """Tell the runner; ends the process if that is gone."""
        if os.getppid() != self._parent:
            os._exit(1)
        self._connection.send(TrialProgress(done, total, words))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Unwind: a process that is ended by the signal itself leaves its semaphores and folders behind."""
    raise SystemExit(128 + signal.SIGTERM)


def work(job: Job, connection: Connection) -> None:
    """The worker's main: one trial, one answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the runner decides
    signal.signal(signal.SIGTERM, _leave)
    # Before torch is imported, which reads it then; trials that need no torch do without.
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    keep_all_memory()
    from experiments.harness.catalogue import experiment_in  # noqa: PLC0415 - may import torch

    for folder in (job.folder, job.shared):
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        answer: Result | Failure = experiment_in(job.module).run(job.spec, Context(job, connection))
    except KilohiveError as error:
        answer = Failure(str(error))
    except Exception:  # noqa: BLE001 - a task's boundary: whatever a trial raises is told, and the others go on
        answer = Failure(traceback.format_exc())
    connection.send(answer)
