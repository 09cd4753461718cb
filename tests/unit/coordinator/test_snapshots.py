"""A coordinator's snapshots, over a fake export: when one is due, what is told of it, and what stays when it fails."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import ConfigError
from common.events import EventLog
from coordinator.config import CoordinatorConfig, LocalConfig
from coordinator.coordinator import open_run
from coordinator.events import SnapshotEvent, SnapshotFailedEvent
from coordinator.local import check
from coordinator.snapshot_folder import snapshot_name
from coordinator.snapshots import Snapshots, pause_s
from protocol.exportable import NAMES
from tests.support.local_swarm import running, until

if TYPE_CHECKING:
    from common.events import Event

FAKE = Path(__file__).resolve().parents[2] / "support" / "fake_export.py"
NOON_S, HOUR_S = 1_796_040_000.0, 3600.0


class Taken:
    """Snapshots that are begun an hour after each other, and what was told of them."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.plan = folder / "plan"
        self.config = CoordinatorConfig(**{"out": folder / "run", "snapshot_every_s": HOUR_S, **changes})
        self.folder = folder / "run" / "snapshots"
        self.told: list[Event] = []
        hours = count(1)
        events = EventLog()
        events.subscribe(lambda event, _t_s: self.told.append(event))
        program = (sys.executable, str(FAKE), str(self.plan))
        self.snapshots = Snapshots(self.config, "run-1", events, program, lambda: NOON_S + HOUR_S * next(hours))
        self.snapshots._folder.open()

    async def take(self, plan: str) -> Event:
        self.plan.write_text(plan, encoding="utf-8")
        await self.snapshots._take()
        return self.told[-1]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != "run.txt")


@pytest.fixture
def taken(tmp_path: Path) -> Taken:
    return Taken(tmp_path, keep_snapshots=2)


@pytest.mark.parametrize(
    ("last_s", "now_s", "wanted_s"),
    [
        (0.0, 0.0, 3600.0),  # at the first start
        (0.0, 600.0, 3000.0),  # one was taken ten minutes ago
        (0.0, 3600.0, 1.0),
        (0.0, 999_999.0, 1.0),  # the coordinator was away
        (999_999.0, 0.0, 3600.0),  # the clock was set back
    ],
)
def test_a_snapshot_is_due_one_interval_after_the_last(last_s: float, now_s: float, wanted_s: float) -> None:
    assert pause_s(last_s, now_s, 3600.0) == wanted_s


async def test_the_last_ones_are_kept_and_each_is_told(taken: Taken) -> None:
    events = [await taken.take("whole") for _ in range(3)]
    assert [Path(event.folder).parent for event in events if isinstance(event, SnapshotEvent)] == [taken.folder] * 3
    names = [Path(event.folder).name for event in events if isinstance(event, SnapshotEvent)]
    assert [event.deleted for event in events if isinstance(event, SnapshotEvent)] == [(), (), (names[0],)]
    assert taken.names() == names[1:]
    assert {event.bytes for event in events if isinstance(event, SnapshotEvent)} == {len("of nothing\n")}


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("fail the trunk has no live replica", "the trunk has no live replica"),
        ("fail /x: cannot be written: No space left on device", "/x: cannot be written: No space left on device"),
        ("silent", r"the export ended with exit code 1; what it said is in .*coordinator/snapshot\.txt"),
    ],
)
async def test_a_failure_is_one_sentence_and_costs_no_older_snapshot(taken: Taken, plan: str, reason: str) -> None:
    for _ in range(2):
        await taken.take("whole")
    before = taken.names()
    event = await taken.take(plan)
    assert isinstance(event, SnapshotFailedEvent)
    assert re.fullmatch(reason, event.reason)
    assert taken.names() == before
    assert isinstance(await taken.take("whole"), SnapshotEvent)
    assert taken.names()[0] == before[1]


async def test_an_export_that_takes_too_long_is_ended(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.snapshots.LONGEST_S", 0.2)
    event = await taken.take("wait")
    assert isinstance(event, SnapshotFailedEvent)
    assert event.reason == "the export took longer than 0.2 s"
    assert taken.names() == []


async def test_a_program_that_cannot_be_started_is_a_failure_too(taken: Taken) -> None:
    taken.snapshots._program = ("/no/such/program",)
    event = await taken.take("whole")
    assert isinstance(event, SnapshotFailedEvent)
    assert event.reason == "/no/such/program: No such file or directory"


@pytest.mark.parametrize("plan", ["wait", "stubborn"])
async def test_stopping_ends_the_export_leaves_nothing_and_is_no_failure(
    tmp_path: Path, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.snapshots.LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr("coordinator.snapshots.STOP_PATIENCE_S", 0.3)
    taken = Taken(tmp_path, snapshot_every_s=0.001)
    taken.plan.write_text(plan, encoding="utf-8")
    began: list[int] = []
    begin = taken.snapshots._begin_export

    def noted(name: str) -> Any:
        child = begin(name)
        began.append(child.pid)
        return child

    monkeypatch.setattr(taken.snapshots, "_begin_export", noted)
    await taken.snapshots.start()
    await until(lambda: any(name.endswith(".partial") for name in taken.names()), "an export")
    await taken.snapshots.stop()
    assert len(began) == 1
    assert running(began) == []
    assert taken.told == []
    assert taken.names() == []


async def test_one_that_was_unfinished_is_discarded(taken: Taken) -> None:
    (taken.folder / "2026-11-30T06-00-00Z.partial").mkdir()
    assert isinstance(event := await taken.take("whole"), SnapshotEvent)
    assert taken.names() == [Path(event.folder).name]


async def test_after_a_restart_the_newest_that_is_whole_says_when_the_next_is_due(taken: Taken) -> None:
    assert isinstance(event := await taken.take("whole"), SnapshotEvent)
    (taken.folder / "2026-11-30T18-00-00Z.partial").mkdir()
    await taken.snapshots.start()
    assert snapshot_name(taken.snapshots._last_s) == Path(event.folder).name
    await taken.snapshots.stop()


async def test_without_one_the_first_is_due_one_interval_after_the_start(taken: Taken) -> None:
    await taken.snapshots.start()
    assert taken.snapshots._last_s == NOON_S + 2 * HOUR_S
    await taken.snapshots.stop()
    assert taken.told == []


async def test_a_snapshot_of_another_export_that_goes_on_is_not_begun(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.snapshot_folder.LEAVE_PATIENCE_S", 0.0)
    other = taken.folder / "2026-11-30T18-00-00Z"
    plan = taken.plan.with_name("other")
    plan.write_text("wait", encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(FAKE), str(plan), "export", "--join", "x", "--out", str(other), "--stop-on-stdin-eof"),
        stdin=asyncio.subprocess.PIPE,
    )
    try:
        await until((taken.folder / f"{other.name}.partial").exists, "the other export")
        event = await taken.take("whole")
        assert isinstance(event, SnapshotFailedEvent)
        assert f"{other.name} is in use by a `export`, process {process.pid}" in event.reason
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert isinstance(await taken.take("whole"), SnapshotEvent)


def test_a_run_that_cannot_be_exported_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(NAMES, "smear")
    out, refusal = tmp_path / "run", "the manifest's model.smear is '2', which an exported model cannot have yet"
    with pytest.raises(ConfigError, match=f"--snapshot-every-s: {refusal}"):
        open_run(CoordinatorConfig(out=out, snapshot_every_s=60.0), "12D3KooWowner")
    assert not out.exists()
    open_run(CoordinatorConfig(out=out), "12D3KooWowner")
    with pytest.raises(ConfigError, match=f"--snapshot-every-s: {refusal}"):
        open_run(CoordinatorConfig(out=out, snapshot_every_s=60.0), "12D3KooWowner")
    with pytest.raises(ConfigError, match=f"snapshot_every_s: {refusal}"):
        check(LocalConfig(out=tmp_path / "local", snapshot_every_s=60.0))
