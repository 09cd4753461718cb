"""The page beside a coordinator: a process of its own, so that it has no part in what the run's first peer does.

Neither the owner's key nor the coordinator's event loop can be reached from it, and if it ends the run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from coordinator.children import PROGRAM, Child, ChildSpec, end_all, exit_words
from coordinator.credit.config import COLLECTED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_S = 1.5


@asynccontextmanager
async def shown_beside(
    run: Path, port: int, stop: asyncio.Event, program: tuple[str, ...] = PROGRAM
) -> AsyncIterator[None]:
    """Show the run whose `swarm.toml` is in folder `run` at a port of this machine, while the context lasts."""
    read = ("--join", str(run / "swarm.toml"), "--credit", str(run / COLLECTED))
    kept = ("--out", str(run / "dashboard"), "--port", str(port))
    argv = (*program, "dashboard", *read, *kept, "--log-level", "warning", "--stop-on-stdin-eof")
    try:
        child = Child(ChildSpec(name="dashboard", argv=argv))
    except OSError as error:
        logger.warning("The page cannot be shown: %s; the run goes on without it", error.strerror)
        yield
        return
    watching = asyncio.create_task(_watch(child, stop), name="dashboard")
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await end_all([child], stop, patience_s=PATIENCE_S, stop_patience_s=PATIENCE_S)


async def _watch(child: Child, stop: asyncio.Event) -> None:
    await child.wait(stop)
    if not stop.is_set():
        logger.warning("The page %s; the run goes on without it", exit_words(child.reap()))
