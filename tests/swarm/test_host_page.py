"""A host and its page, as its owner meets them: a limit that is set there holds, and pause and resume are obeyed."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from typing import Any

import httpx
import psutil
import pytest

from experiments.live.processes import Node, ProcessSwarm, wait_until
from node.host.owner_limits import LIMITS_FILE
from node.host.page_door import URL_FILE
from tests.support.swarm_parts import small_manifest

MANIFEST = small_manifest(optimizer={"total_tokens": 1_000_000_000})
TRAIN = ("--steps", "100000", "--batch", "2", "--micro-batches", "1", "--eval-every", "0", "--set", "eval_bytes=256")
TIMEOUT_S = 60.0
CPU_PERCENT = 10.0
SECONDS = 6.0
OVER = 1.6
"""A few seconds are no mean yet: a host pays for a burst afterwards."""


class OwnersPage:
    """A browser of the owner's, which has opened the address that the host has told."""

    def __init__(self, host: Node, url: str = "") -> None:
        self.url = url or (host.folder / URL_FILE).read_text().strip()
        base = self.url.partition("/enter")[0]
        self.client = httpx.Client(base_url=base, timeout=TIMEOUT_S, follow_redirects=True, headers={"Origin": base})
        assert self.client.get(self.url).status_code == 200

    def close(self) -> None:
        self.client.close()

    def told(self) -> dict[str, Any]:
        """What the page is told now."""
        with self.client.stream("GET", "/api/events") as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    found: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    return found
        raise AssertionError

    def told_when(self, what: str, wanted: Any) -> dict[str, Any]:
        """What the page is told once `wanted` holds of it."""
        seen = list[dict[str, Any]]()

        def is_so() -> bool:
            seen.append(self.told())
            return bool(wanted(seen[-1]))

        wait_until(is_so, what, TIMEOUT_S)
        return seen[-1]

    def act(self, action: str, body: object) -> httpx.Response:
        headers = {"X-Kilohive-Page": self.told()["act_key"]}
        return self.client.post(f"/api/{action}", json=body, headers=headers)


def started(swarm: ProcessSwarm, name: str) -> Node:
    place = ("--join", str(swarm.swarm_file), "--state", str(swarm.folder / name), "--page-listen", "127.0.0.1:0")
    host = swarm.start(name, "host", *place, "--max-blocks", "8", "--set", "recheck_s=2")
    host.wait_for("announced", count=len(host.events("announced")) + 1)
    return host


def cpu_percent(page: OwnersPage) -> float:
    """Of one core, as the host itself counts it, over some seconds."""
    began_s = time.time()
    first = page.told_when("the host is asked now", lambda told: told["now_s"] > began_s)
    last = page.told_when("seconds have passed", lambda told: told["now_s"] > first["now_s"] + SECONDS)
    return 100 * float(last["use"]["cpu_s"] - first["use"]["cpu_s"]) / float(last["now_s"] - first["now_s"])


@pytest.mark.slow  # rates are means over seconds
@pytest.mark.timeout(300)
def test_an_owner_sets_a_limit_pauses_resumes_and_leaves_on_the_page_of_a_host(swarm: ProcessSwarm) -> None:
    host = started(swarm, "guest")
    trainer = swarm.trainer("trainer", *TRAIN)
    trainer.wait_for("step", TIMEOUT_S, count=5)
    with closing(OwnersPage(host)) as page:
        before = page.told_when("it works", lambda told: told["work"]["tokens_per_s"] > 0)
        assert before["sentence"].startswith("This machine serves 32 experts in 8 blocks, and answers ")
        assert before["held"]["serving"] == 8
        assert page.told_when("pairs are counted", lambda told: told["credit"]["answered"] > 0)["problem"] == ""
        assert cpu_percent(page) > OVER * CPU_PERCENT

        refused = page.act("limits", {"limits": {"max_memory": "1MB"}})
        assert refused.status_code == 400
        assert "--max-memory: 1 MB" in refused.json()["error"]["message"]
        assert page.act("limits", {"limits": {"max_cpu_percent": CPU_PERCENT}}).status_code == 200
        assert host.events("limits")[-1]["limits"]["cpu_percent"] == CPU_PERCENT
        assert cpu_percent(page) < OVER * CPU_PERCENT

        assert page.act("pause", {"seconds": 3600}).json()["until_s"] > time.time()
        paused = page.told_when("it is paused", lambda told: told["availability"]["away"])
        assert paused["sentence"].startswith("This machine is paused until ")
        assert host.events("paused")
        assert page.act("resume", {}).status_code == 200
        page.told_when("it serves again", lambda told: told["held"]["serving"] == 8)
        assert trainer.stop() == 130

        assert page.act("leave", {}).status_code == 200
        wait_until(host.child.ended, "it has left", TIMEOUT_S)
    assert host.stop() == 0
    swarm.nodes.remove(host)
    again = started(swarm, "guest")
    with closing(OwnersPage(again)) as page:
        assert page.told()["limits"]["settings"]["max_cpu_percent"] == CPU_PERCENT
    assert json.loads((again.folder / LIMITS_FILE).read_text()) == {"max_cpu_percent": CPU_PERCENT}


def pages_of(host: Node) -> list[psutil.Process]:
    return [child for child in psutil.Process(host.child.pid).children() if "page" in child.cmdline()]


@pytest.mark.timeout(120)
def test_a_host_starts_no_page_until_somebody_looks_and_lives_on_when_it_is_killed(swarm: ProcessSwarm) -> None:
    host = started(swarm, "watched")
    assert pages_of(host) == []
    with closing(OwnersPage(host)) as page:
        (child,) = pages_of(host)
        child.kill()
        child.wait(TIMEOUT_S)
    with closing(OwnersPage(host)) as page:
        assert page.told()["problem"] == ""


def test_a_host_that_is_told_to_has_no_page_until_one_is_started_by_hand(swarm: ProcessSwarm) -> None:
    host = swarm.host("plain", "0/0")
    host.wait_for("announced")
    assert not (host.folder / URL_FILE).exists()
    assert "Its page" not in (host.folder / "log.txt").read_text()
    by_hand = swarm.start("by-hand", "page", "--state", str(host.folder), "--set", "listen='127.0.0.1:0'")
    log = by_hand.folder / "log.txt"
    wait_until(lambda: "/enter?token=" in log.read_text(), "the page tells where it is", TIMEOUT_S)
    (url,) = re.findall(r"http://\S+/enter\S+", log.read_text())
    with closing(OwnersPage(host, url)) as page:
        assert page.told()["held"]["serving"] == 1
