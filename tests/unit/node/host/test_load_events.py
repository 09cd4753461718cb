"""A host tells what it does as it does it, and seldom while it does nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.events import EventLog
from node.host.load_events import LOAD_EVENT_PERIOD_S, LoadEvents

if TYPE_CHECKING:
    from pathlib import Path

MONTH_S = 30 * 86_400


class Parts:
    """What a host's load is read from, as an idle host has it: only the DHT sends, receives and computes."""

    def __init__(self, folder: Path) -> None:
        self.runtime = SimpleNamespace(
            tokens_per_s=0.0, tokens_total=7, queue_tokens=0, kept_bytes=0, refused=0, staleness=0.0, steps_refused=0
        )
        self.rates = SimpleNamespace(sent_bytes=0, received_bytes=0, cpu_s=0.0, count_child=lambda: None)
        self.memory = SimpleNamespace(used_bytes=250_000_000)
        self.now_s = 0.0
        self.path = folder / "events.jsonl"
        self.log = EventLog(self.path)
        self.load = LoadEvents(
            cast("Any", self.runtime),
            cast("Any", self.rates),
            cast("Any", self.memory),
            lambda: 123_456_789,
            self.log,
            lambda: self.now_s,
        )

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds / LOAD_EVENT_PERIOD_S)):
            self.now_s += LOAD_EVENT_PERIOD_S
            self.rates.sent_bytes += 900
            self.rates.received_bytes += 700
            self.rates.cpu_s += 0.03
            self.memory.used_bytes += 4096
            self.load.tell()

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def test_an_idle_host_writes_little(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.pass_time(3600)
    parts.log.close()
    assert 50 < len(parts.told()) <= 61
    assert parts.path.stat().st_size * MONTH_S / 3600 < 20_000_000


def test_a_host_that_works_tells_it_every_time_and_that_it_has_stopped(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.pass_time(10)
    for tokens in (100, 200, 300):
        parts.runtime.tokens_total, parts.runtime.tokens_per_s = tokens, 50.0
        parts.pass_time(LOAD_EVENT_PERIOD_S)
    parts.runtime.tokens_per_s = 0.0
    parts.pass_time(10)
    parts.log.close()
    assert [(row["tokens_total"], row["tokens_per_s"]) for row in parts.told()] == [
        (7, 0.0),
        (100, 50.0),
        (200, 50.0),
        (300, 50.0),
        (300, 0.0),
    ]
