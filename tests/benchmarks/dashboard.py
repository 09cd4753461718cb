"""python -m tests.benchmarks.dashboard --json runs/bench/dashboard.json

How long the server of a run's page takes for each answer, with as many peers as a run may ever have, and how large the
answer is; also while it looks at the run again, which takes turns with answers. `--peers 500 --blocks 50` for a look.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import uvloop

from coordinator.dashboard.files import PAGES
from coordinator.dashboard.history import AVERAGED, COLUMNS, DAY_S, FILE, MAX_EVALUATIONS, TIERS, RunHistory
from coordinator.dashboard.snapshot import take_snapshot
from tests.benchmarks.report import RunsConfig, Teller, alternate, not_compared
from tests.support.dashboard import MB, ViewedDirectory, page_server
from tests.support.run_views import CROWD, crowd, crowd_id

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from protocol.manifest import Manifest
    from tests.benchmarks.report import Row
    from tests.support.dashboard import PageServer

LOOK, WHILE = "a look at the run", "the overview, while it looks"
MILLISECONDS, KILOBYTES, NOTHING = "ms of the server", "kB", "nothing"
NOTES = (
    "over ASGI in one process, so without the network's time; one request after the other",
    "the aim is less than 300 ms for every answer with 10,000 peers and 20,000 blocks",
)
LAYERS = CROWD.model.n_layers


@dataclass(frozen=True, kw_only=True)
class DashboardBenchmark(RunsConfig):
    """Milliseconds of answers about a large run."""

    peers: int = 10_000
    """Have this many peers, a tenth of them trainers."""
    blocks: int = 1000
    """Have this many blocks in each of 20 layers, with two replicas each."""


def main(config: DashboardBenchmark) -> None:
    """Measure, write, print."""
    model = replace(CROWD.model, experts_per_layer=config.blocks * CROWD.model.experts_per_block)
    manifest = replace(CROWD, model=model)
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        fill_history(Path(folder), manifest)
        stack, directory = AsyncExitStack(), ViewedDirectory(crowd(config.peers, manifest))
        try:
            server = runner.run(
                stack.enter_async_context(page_server(Path(folder), directory=directory, manifest=manifest))
            )
            client = runner.run(stack.enter_async_context(server.client()))
            contenders = {name: timed(runner, client, name, path, sizes) for name, path in paths(config.peers).items()}
            contenders[LOOK] = lambda: milliseconds(lambda: take_snapshot(manifest, directory.view))
            contenders[WHILE] = lambda: runner.run(while_looking(server, client))
            figures = alternate(contenders, config.runs, Teller())
        finally:
            runner.run(stack.aclose())
    size = f"{config.peers:,} peers, {LAYERS * config.blocks:,} blocks with two replicas each"
    config.publish("dashboard", rows_of(figures, sizes), (size, *NOTES))


def paths(n_peers: int) -> dict[str, str]:
    """What is asked for, by what it is called."""
    api = {
        "the overview": "/api/overview",
        "the history": "/api/history?span=all",
        "peers": "/api/peers?role=all&page=7",
        "peers, searched": f"/api/peers?role=all&search={crowd_id(n_peers - 1)[-6:]}",
        "a host": f"/api/peer?id={crowd_id(n_peers - 1)}",
        "a trainer": f"/api/peer?id={crowd_id(0)}",
        "a layer": "/api/layer?layer=7&page=3",
    }
    return api | {f"the page {path}": path for path in PAGES}


def fill_history(folder: Path, manifest: Manifest) -> None:
    """As much as a history ever has of its coarsest rows and its evaluations."""
    history, until_s = RunHistory(folder / FILE, manifest.run_id, 64 * MB), 1000
    evaluations = [(number * 1000, 4.0) for number in range(MAX_EVALUATIONS)]
    sample = dict.fromkeys(COLUMNS, 1.0) | dict.fromkeys(AVERAGED, 0.3333)
    for t_s in range(until_s - 60 * DAY_S, until_s, TIERS[-1].step_s):
        history.add(t_s, sample, evaluations)
        evaluations = []
    history.close()


def timed(
    runner: asyncio.Runner, client: httpx.AsyncClient, name: str, path: str, sizes: dict[str, int]
) -> Callable[[], float]:
    """What measures one answer, in milliseconds; its size goes to `sizes`."""

    async def once() -> float:
        started = time.perf_counter()
        answer = await client.get(path)
        took_ms = 1e3 * (time.perf_counter() - started)
        answer.raise_for_status()
        sizes[name] = len(answer.content)
        return took_ms

    return lambda: runner.run(once())


async def while_looking(server: PageServer, client: httpx.AsyncClient) -> float:
    """The slowest answer of those that are asked for while the server looks once, in milliseconds."""
    looking, slowest_ms = asyncio.create_task(server.watch.look()), 0.0
    while not looking.done():
        started = time.perf_counter()
        (await client.get("/api/overview")).raise_for_status()
        slowest_ms = max(slowest_ms, 1e3 * (time.perf_counter() - started))
        await asyncio.sleep(0)  # an answer in the same process waits for nothing, and the look would never go on
    await looking
    return slowest_ms


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def rows_of(figures: dict[str, list[float]], sizes: dict[str, int]) -> list[Row]:
    """Two rows for each answer; nothing else does the same, so there is nothing to compare with."""
    times = [not_compared(name, MILLISECONDS, found, NOTHING, "") for name, found in figures.items()]
    return [*times, *(not_compared(name, KILOBYTES, [size / 1e3], NOTHING, "") for name, size in sizes.items())]


if __name__ == "__main__":
    try:
        main(tyro.cli(DashboardBenchmark))
    except KeyboardInterrupt:
        sys.exit(130)
