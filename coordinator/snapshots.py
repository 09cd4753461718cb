"""Snapshots: a run's model is exported again and again, and the last few exports are kept.

Each is made by `export` in a process of its own, one at a time, which joins the run as anybody would: the coordinator's
loop and memory have no part in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.command_line import arguments_for
from common.errors import KilohiveError, UnavailableError
from common.tasks import within
from common.text import bytes_text
from coordinator.children import PROGRAM, Child, ChildSpec, end_all, exit_words
from coordinator.events import SnapshotEvent, SnapshotFailedEvent
from coordinator.snapshot_folder import SnapshotFolder, began_at, snapshot_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.events import EventLog
    from coordinator.config import CoordinatorConfig

logger = logging.getLogger(__name__)

LEAST_PAUSE_S = 1.0
"""Names of snapshots tell them apart by the second."""

LONGEST_S = 86_400.0
"""An export that takes longer than a day is ended."""

STOP_PATIENCE_S = 1.3
"""How long an export may take to leave: what is behind it has to fit into the three seconds of a stop too."""

ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
ERROR: Final = "error: "


def pause_s(last_s: float, now_s: float, every_s: float) -> float:
    """Seconds until a snapshot is due, where the last one was begun at `last_s`.

    A clock that was set back puts it off by no more than `every_s`.
    """
    return max(LEAST_PAUSE_S, min(every_s, last_s + every_s - now_s))


class Snapshots:
    """Takes and keeps the snapshots of a run, from `start` to `stop`. Belongs to the event loop.

    `program`: the command line up to the subcommand.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        run_id: str,
        events: EventLog,
        program: tuple[str, ...] = PROGRAM,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._events, self._program, self._clock = config, events, program, clock
        folder = Path(config.snapshots) if config.snapshots else config.out / "snapshots"
        self._folder = SnapshotFolder(folder, run_id)
        self._log = config.out / "coordinator" / "snapshot.txt"
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_s = clock()

    async def start(self) -> None:
        """Begin: the first one is due by the newest that is there, or else one interval from now.

        Raises ConfigError if the folder cannot be used, or is that of another run.
        """
        await asyncio.to_thread(self._folder.open)
        whole = await asyncio.to_thread(self._folder.whole)
        self._last_s = (began_at(whole[-1]) if whole else None) or self._clock()
        self._task = asyncio.create_task(self._run(), name="snapshots")

    async def stop(self) -> None:
        """Take no more, and end the export that goes on."""
        self._ending.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        every_s = self._config.snapshot_every_s
        while not await self._ends_within(pause_s(self._last_s, self._clock(), every_s)):
            await self._take()

    async def _ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        return self._ending.is_set()

    async def _take(self) -> None:
        """Have one more snapshot, or tell why there is none; what is there already stays then."""
        self._last_s = began_s = self._clock()
        name = snapshot_name(began_s)
        try:
            await asyncio.to_thread(self._folder.tidy)
            await self._export(name)
            n_bytes = await asyncio.to_thread(self._folder.n_bytes, name)
        except (KilohiveError, OSError) as error:
            self._tell_failure(_sentence(error))
            return
        path, seconds = self._folder.folder / name, round(self._clock() - began_s, 1)
        deleted = await self._deleted(lambda: self._folder.drop_older(name, self._config.keep_snapshots))
        logger.info("The snapshot %s is whole: %s, after %g s", path, bytes_text(n_bytes), seconds)
        self._events.emit(SnapshotEvent(folder=str(path), bytes=n_bytes, seconds=seconds, deleted=deleted))

    async def _export(self, name: str) -> None:
        """Have a whole snapshot of this name. Raises UnavailableError that says why there is none, OSError."""
        child = self._begin_export(name)
        try:
            async with within(LONGEST_S, "the export"):
                await child.wait(self._ending)
        finally:
            await end_all([child], self._ending, patience_s=STOP_PATIENCE_S, stop_patience_s=STOP_PATIENCE_S)
            await self._deleted(self._folder.tidy)
        if not await asyncio.to_thread(self._folder.is_whole, name):
            raise UnavailableError(_last_words(child))

    def _begin_export(self, name: str) -> Child:
        flags = arguments_for({"join": self._config.out / "swarm.toml", "out": self._folder.folder / name})
        argv = (*self._program, "export", *flags, "--stop-on-stdin-eof")
        self._log.unlink(missing_ok=True)  # of the export before: the log does not grow from one to the next
        return Child(ChildSpec(name="export", argv=argv, log=self._log, environment=ENVIRONMENT))

    async def _deleted(self, delete: Callable[[], tuple[str, ...] | None]) -> tuple[str, ...]:
        """What `delete` returns; where it fails that is told, and tried again with the next snapshot."""
        try:
            return await asyncio.to_thread(delete) or ()
        except (KilohiveError, OSError) as error:
            logger.warning("Snapshots that are of no use any more stay: %s", _sentence(error))
            return ()

    def _tell_failure(self, reason: str) -> None:
        if self._ending.is_set():
            logger.info("The snapshot that was under way is given up")
            return
        logger.warning("There is no snapshot this time: %s", reason)
        self._events.emit(SnapshotFailedEvent(reason=reason))


def _sentence(error: KilohiveError | OSError) -> str:
    return f"{error.filename}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def _last_words(child: Child) -> str:
    """Why an export that has ended failed: its own sentence, if it came to say one."""
    lines = child.log_tail().splitlines()
    said = next((line.removeprefix(ERROR) for line in reversed(lines) if line.startswith(ERROR)), "")
    return said or f"the export {exit_words(child.reap())}; what it said is in {child.spec.log}"
