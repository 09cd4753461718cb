"""Why a host does not work is told in its event log and in its folder, when it changes and only then."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from common.events import EventLog
from node.host.availability import Availability, Reason
from node.host.availability_report import AvailabilityReport
from node.limits.availability_file import AVAILABILITY_FILE, read_availability
from tests.support.events import written_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder, self.availability, self.told = folder, Availability(), list[dict[str, Any]]()
        events = EventLog()
        events.subscribe(written_to(self.told))
        self.report = AvailabilityReport(self.availability, folder, events)

    async def heard(self, count: int) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while len(self.told) < count:  # noqa: ASYNC110 - the log has no event to wait for
                await asyncio.sleep(0.001)
        return self.told[-1]

    async def written(self, n_reasons: int) -> None:
        async with asyncio.timeout(10):
            while (told := read_availability(self.folder)) is None or len(told.reasons) != n_reasons:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def reporting(folder: Path) -> AsyncIterator[Scene]:
    scene = Scene(folder)
    following = asyncio.create_task(scene.report.follow())
    try:
        yield scene
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_reasons_and_what_is_not_known_are_told_at_first_and_when_they_change(tmp_path: Path) -> None:
    async with reporting(tmp_path) as scene:
        first = await scene.heard(1)
        assert (first["event"], first["reasons"], first["unknown"]) == ("availability", [], [])
        scene.availability.tell(Reason.PROGRAM, "steam runs")
        (reason,) = (await scene.heard(2))["reasons"]
        assert (reason["name"], reason["why"], reason["until_s"]) == ("program", "steam runs", None)
        await scene.written(1)
        scene.availability.tell_unknown(Reason.PERSON, "whether anybody is there is not known")
        scene.availability.tell(Reason.PROGRAM, "")
        told = await scene.heard(3)
        assert (told["reasons"], told["unknown"]) == ([], ["whether anybody is there is not known"])
        await scene.written(0)
    assert len(scene.told) == 3
    assert not (tmp_path / AVAILABILITY_FILE).exists(), "a host that has left says nothing"


async def test_a_disk_that_is_full_is_said_once_and_keeps_nothing_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("node.host.availability_report.write_availability", full)
    async with reporting(tmp_path) as scene:
        await scene.heard(1)
        for count, why in enumerate(("steam runs", ""), start=2):
            scene.availability.tell(Reason.PROGRAM, why)
            await scene.heard(count)
    assert caplog.text.count("so `health` shows no reasons") == 1
