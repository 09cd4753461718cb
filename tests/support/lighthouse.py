"""A lighthouse as a process, for tests: it cannot be imported beside hivemind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import urllib.request
from typing import TYPE_CHECKING, Protocol

import pytest
from hivemind.p2p import PeerID

from common.command_line import arguments_for
from coordinator.lighthouse.config import LighthouseConfig
from experiments.live.processes import Node, events
from protocol.identity import Identity
from tests.support.dht_nodes import RUN, eventually
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_libp2p = pytest.mark.skipif(
    importlib.util.find_spec("libp2p") is None, reason="libp2p is not installed: make setup-lighthouse says why"
)

NOBODY = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
"""An initial peer that is not there: a lighthouse does without."""


class Lighthouse(Node):
    """A process; `address` is what it tells others."""

    def __init__(self, folder: Path, initial_peers: tuple[str, ...], *flags: str) -> None:
        folder.mkdir(exist_ok=True)
        earlier = len(events(folder / "events.jsonl", "start"))
        self.metrics_port = free_port()
        where = arguments_for({"run_id": RUN, "initial_peers": initial_peers, "state": folder}, LighthouseConfig)
        super().__init__(folder, ("lighthouse", *where, "--metrics-port", str(self.metrics_port), *flags))
        started = self.wait_for("start", count=earlier + 1)
        self.address = str(started["addresses"][0])
        self.peer_id = PeerID.from_base58(started["peer_id"])

    def metrics(self) -> dict[str, float]:
        """What it serves now, each with its labels as they stand there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def metric_becomes(lighthouse: Lighthouse, name: str, value: float) -> None:
    """Wait for it; TimeoutError if it does not."""

    async def is_so() -> bool:
        return (await asyncio.to_thread(lighthouse.metrics))[name] == value

    await eventually(is_so, timeout_s=60.0)


class Light(Protocol):
    """Starts a lighthouse that joins through `initial_peers`."""

    def __call__(self, *flags: str, initial_peers: tuple[str, ...] = (NOBODY,), name: str = "light") -> Lighthouse: ...


@contextlib.contextmanager
def running_lighthouses(folder: Path) -> Iterator[Light]:
    """Stops every lighthouse that was started."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, initial_peers: tuple[str, ...] = (NOBODY,), name: str = "light") -> Lighthouse:
            lighthouse = Lighthouse(folder / name, initial_peers, *flags)
            stack.callback(lighthouse.stop)
            return lighthouse

        yield start
