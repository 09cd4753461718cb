"""A swarm of processes that trains, its page in a process of its own, and a browser; all for the files of this folder.

Run by `make browser-test`, which names Chromium in the environment. Pictures of every page go to runs/browser, or to
the folder that PICTURES names.
"""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

from experiments.live.processes import process_swarm, wait_until
from tests.support.ports import free_port
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from experiments.live.processes import Node, ProcessSwarm

ROOT = Path(__file__).resolve().parents[2]
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SMALL = small_manifest(
    model={"experts_per_layer": 64, "experts_per_token": 4, "d_model": 32, "expert_hidden": 16, "context": 32},
    optimizer={"lr": 5e-3, "expert_lr": 5e-3, "total_tokens": 100_000_000, "warmup_tokens": 500},
)
MANIFEST = replace(_SMALL, name="hive")
HOSTS = {"host-0": "0/0-10,1/0-10", "host-1": "0/5-15,1/5-15", "host-2": "0/11-15,0/0-4,1/11-15,1/0-4"}
"""Of 16 blocks in each layer; two hosts have each."""
TRAIN = ("--steps", "1000000", "--batch", "4", "--eval-every", "20", "--set", "eval_bytes=2048")
POINTS = int(os.environ.get("POINTS", "8"))
"""So many points of history, 10 s apart, are waited for, so that charts have lines."""
PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class LivePage:
    """A run that trains, and where its page is."""

    swarm: ProcessSwarm
    hosts: dict[str, Node]
    trainer: Node
    url: str
    port: int

    def api(self, path: str) -> dict[str, Any]:
        """What the page itself is given."""
        with urllib.request.urlopen(f"{self.url}/api/{path}", timeout=10) as answer:  # noqa: S310 - this machine
            told: dict[str, Any] = json.load(answer)
            return told

    def collect(self) -> bool:
        """Collect receipts, of which there is one a minute for each pair; whether anybody has earned anything."""
        told = ("--join", str(self.swarm.swarm_file), "--out", str(self.swarm.folder / "collected"))
        collecting = self.swarm.start("credit", "credit", *told)
        wait_until(collecting.child.ended, "a collection", PATIENCE_S)
        return bool(self.api("credit")["total"])

    @property
    def _credit(self) -> tuple[str, ...]:
        return ("--credit", str(self.swarm.folder / "collected"), "--set", "credit_s=1")

    def start(self, name: str = "dashboard", *flags: str, port: int = 0) -> Node:
        """Start a server of the page, and wait until it answers."""
        out, port = self.swarm.folder / name, port or self.port
        told = ("--join", str(self.swarm.swarm_file), "--out", str(out), "--port", str(port), *self._credit)
        node = self.swarm.start(name, "dashboard", *told, *flags)
        wait_until(lambda: " is shown at " in (out / "log.txt").read_text(), f"{name} answers", PATIENCE_S)
        return node


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where pictures go."""
    folder = Path(os.environ.get("PICTURES", ROOT / "runs" / "browser"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, as the machine has it."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=list(BROWSER_FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePage]:
    """A run with two replicas of each block and one trainer, and its page, which has a history of a minute or so."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("\n\n".join(f"Sentence {n} says that {n} plus {n} is {n + n}." for n in range(3000)))
    with process_swarm(tmp_path_factory.mktemp("swarm"), MANIFEST) as swarm:
        hosts = {name: swarm.host(name, blocks) for name, blocks in HOSTS.items()}
        trainer, port = swarm.trainer("trainer", "--data", str(text), *TRAIN), free_port()
        page = LivePage(swarm=swarm, hosts=hosts, trainer=trainer, url=f"http://127.0.0.1:{port}", port=port)
        page.start()
        trainer.wait_for("eval", count=5, timeout_s=PATIENCE_S)
        wait_until(lambda: len(page.api("history")["t_s"]) >= POINTS, "a history", PATIENCE_S + 10 * POINTS)
        wait_until(page.collect, "credit", 2 * PATIENCE_S)
        yield page
