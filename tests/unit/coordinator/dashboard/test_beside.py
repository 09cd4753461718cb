"""The page beside a coordinator: a process of its own that comes and goes without the run's first peer."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

from coordinator.dashboard.beside import shown_beside
from tests.support.local_swarm import until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

WAITS = "import json, pathlib, sys; pathlib.Path({path!r}).write_text(json.dumps(sys.argv[1:])); sys.stdin.read()"


def program(tmp_path: Path) -> tuple[str, ...]:
    """A page that writes down what it was told, and then waits until its standard input ends."""
    return (sys.executable, "-c", WAITS.format(path=str(tmp_path / "told")))


async def test_it_is_told_the_run_and_the_port_and_ends_with_the_coordinator(tmp_path: Path) -> None:
    async with shown_beside(tmp_path / "run", 8080, asyncio.Event(), program(tmp_path)):
        await until(lambda: (tmp_path / "told").exists() and bool((tmp_path / "told").read_text()), "the page")
    told = json.loads((tmp_path / "told").read_text())
    assert told[0] == "dashboard"
    flags = dict(zip(told[1::2], told[2::2], strict=False))
    assert flags["--join"] == str(tmp_path / "run" / "swarm.toml")
    assert (flags["--port"], flags["--out"]) == ("8080", str(tmp_path / "run" / "dashboard"))
    assert flags["--credit"] == str(tmp_path / "run" / "coordinator" / "credit")
    assert told[-1] == "--stop-on-stdin-eof"


async def test_a_page_that_ends_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = (sys.executable, "-c", "raise SystemExit(3)")
    async with shown_beside(tmp_path, 8080, asyncio.Event(), ends):
        await until(lambda: bool(caplog.messages), "a warning")
    assert caplog.messages == ["The page ended with exit code 3; the run goes on without it"]


async def test_a_page_that_cannot_be_started_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with shown_beside(tmp_path, 8080, asyncio.Event(), (str(tmp_path / "nothing"),)):
        assert "The page cannot be shown: No such file or directory; the run goes on without it" in caplog.text


async def test_a_page_that_ends_because_all_is_stopped_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()
    async with shown_beside(tmp_path, 8080, stop, program(tmp_path)):
        stop.set()
    assert caplog.text == ""
