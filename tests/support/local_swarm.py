"""A local swarm's supervisor over the fake program of `fake_swarm.py`, and what its children left behind."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from coordinator.config import LocalConfig
from coordinator.local import LocalSwarm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = (sys.executable, str(ROOT / "tests" / "support" / "fake_swarm.py"))
PATIENCE_S = 20.0


def config_in(out: Path, hosts: int = 2, **changes: Any) -> LocalConfig:
    return LocalConfig(out=out, hosts=hosts, experts=16, experts_per_block=2, **changes)


def pids(out: Path) -> dict[str, int]:
    lines = (out / "pids").read_text(encoding="utf-8").splitlines() if (out / "pids").exists() else []
    return {name: int(pid) for name, pid in (line.split() for line in lines)}


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        await asyncio.sleep(0.01)


def running(process_ids: Iterable[int]) -> list[int]:
    return [pid for pid in process_ids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


async def run(out: Path, stop: asyncio.Event | None = None, **changes: Any) -> int:
    return await LocalSwarm(config_in(out, **changes), stop or asyncio.Event(), FAKE).run()


def told(out: Path, child: str) -> dict[str, str]:
    """The flags that a child was given; a flag without a value is its own value."""
    words = json.loads((out / f"{child}.argv").read_text(encoding="utf-8"))[1:]
    pairs = pairwise([*words, "--"])
    return {flag: flag if value.startswith("--") else value for flag, value in pairs if flag.startswith("--")}


def rows(out: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "local.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["event"] == event]


async def run_to_the_end(out: Path, n_children: int, **changes: Any) -> int:
    """A run whose first trainer begins and ends with 0, once all children are up."""
    for name in ("pids", "go"):
        (out / name).unlink(missing_ok=True)
    swarm = asyncio.create_task(run(out, **changes))
    await until(lambda: len(pids(out)) == n_children, "all children")
    (out / "go").touch()
    return await swarm
