"""A run's roles in one event loop, over a real DHT and gRPC."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from coordinator.config import CoordinatorConfig, read_manifest
from coordinator.coordinator import run_coordinator
from node.host.command import run_host
from node.host.config import HostConfig
from node.trainer.config import TrainConfig
from node.trainer.trainer import run_trainer
from protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from protocol.manifest import Manifest

HANG_S = 60.0


class RunInLoop:
    """A coordinator that names one trainer as its evaluator, hosts, and that trainer; each a task here."""

    def __init__(self, folder: Path, manifest: Manifest, text: Path, steps: int = 0, **of_coordinator: Any) -> None:
        self.folder, self.manifest, self.text, self._steps = folder, manifest, text, steps
        self._of_coordinator = of_coordinator
        self.swarm_file = folder / "run" / "swarm.toml"
        self.trainer_folder = folder / "trainer"
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        self.trainer: asyncio.Task[Any]

    async def start(self, n_hosts: int) -> None:
        (self.folder / "wanted.toml").write_text(self.manifest.to_toml())
        evaluator = Identity.load_or_create(self.trainer_folder / "identity.key").peer_id
        self._begin(
            run_coordinator(
                CoordinatorConfig(
                    out=self.folder / "run",
                    manifest=self.folder / "wanted.toml",
                    evaluators=(evaluator,),
                    **self._of_coordinator,
                ),
                self._stop,
            )
        )
        await self.until(self.swarm_file.exists)
        self.manifest = read_manifest(self.folder / "run" / "manifest.toml")
        for number in range(n_hosts):
            state = self.folder / f"host-{number}"
            self._begin(
                run_host(HostConfig(swarm=self.swarm_file, state=state, recheck_s=0, page_listen="none"), self._stop)
            )
        trainer = TrainConfig(
            swarm=self.swarm_file,
            out=self.trainer_folder,
            data=self.text,
            steps=self._steps,
            save_every=20,
            plain=True,
            eval_every=0,
        )
        self.trainer = self._begin(run_trainer(trainer, self._stop))

    def _begin(self, role: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(role)
        self._tasks.append(task)
        return task

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait; what ended a role is raised."""
        async with asyncio.timeout(HANG_S):
            while not condition():
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait_for(asyncio.gather(*self._tasks), HANG_S)


@asynccontextmanager
async def run_in_loop(
    folder: Path, manifest: Manifest, text: Path, n_hosts: int, steps: int = 0, **of_coordinator: Any
) -> AsyncIterator[RunInLoop]:
    """`steps` are the trainer's; 0 are as many as the run has tokens for. The rest are settings of the coordinator."""
    run = RunInLoop(folder, manifest, text, steps, **of_coordinator)
    try:
        await run.start(n_hosts)
        yield run
    finally:
        await run.stop()
