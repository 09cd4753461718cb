"""Which snapshots of a run stay: the newest ones that are whole; of what is not whole, nothing but where it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from common.folders import FolderClaim, claimed
from coordinator.snapshot_folder import SnapshotFolder, began_at, snapshot_name

if TYPE_CHECKING:
    from pathlib import Path

NOON_S = 1_796_040_000.0
NAMES = [snapshot_name(NOON_S + 3600 * hour) for hour in range(5)]


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotFolder:
    found = SnapshotFolder(tmp_path / "snapshots", "run-1")
    found.open()
    return found


def write_whole(snapshots: SnapshotFolder, *names: str) -> None:
    for name in names:
        folder = snapshots.folder / name
        folder.mkdir()
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"x" * 90)
        (folder / "SHA256SUMS").write_bytes(b"y" * 10)


def write_unfinished(snapshots: SnapshotFolder, name: str) -> None:
    (snapshots.folder / f"{name}.partial" / "parts").mkdir(parents=True)
    (snapshots.folder / f"{name}.partial" / "parts" / "trunk.safetensors").write_bytes(b"x" * 90)
    (snapshots.folder / f".{name}.lock").touch()


def names_in(snapshots: SnapshotFolder) -> list[str]:
    return sorted(path.name for path in snapshots.folder.iterdir())


def test_a_name_says_utc_and_names_sort_by_time() -> None:
    assert snapshot_name(NOON_S) == "2026-11-30T12-00-00Z"
    assert began_at("2026-11-30T12-00-00Z") == NOON_S
    assert sorted(NAMES, reverse=True) == [snapshot_name(NOON_S + 3600 * hour) for hour in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    "name", ["", "run.txt", "2026-11-30", "2026-11-30T12-00-00", "2026-13-30T12-00-00Z", "2026-11-3T12-00-00Z"]
)
def test_another_name_is_no_snapshots(name: str) -> None:
    assert began_at(name) is None


def test_the_oldest_go_until_so_many_are_left(snapshots: SnapshotFolder) -> None:
    write_whole(snapshots, *NAMES)
    assert snapshots.whole() == NAMES
    assert snapshots.n_bytes(NAMES[0]) == 100
    assert snapshots.drop_older(NAMES[4], keep=3) == tuple(NAMES[:2])
    assert names_in(snapshots) == [*NAMES[2:], "run.txt"]
    assert snapshots.drop_older(NAMES[4], keep=3) == ()
    assert snapshots.drop_older(NAMES[4], keep=1) == tuple(NAMES[2:4])
    assert snapshots.whole() == [NAMES[4]]


def test_fewer_than_are_kept_all_stay(snapshots: SnapshotFolder) -> None:
    write_whole(snapshots, NAMES[0])
    assert snapshots.drop_older(NAMES[0], keep=3) == ()
    assert snapshots.whole() == [NAMES[0]]


def test_what_is_not_whole_does_not_count(snapshots: SnapshotFolder) -> None:
    write_whole(snapshots, *NAMES[:3])
    write_unfinished(snapshots, NAMES[3])
    (snapshots.folder / NAMES[4]).mkdir()  # somebody has emptied it
    assert snapshots.whole() == NAMES[:3]
    assert snapshots.drop_older(NAMES[2], keep=3) == ()
    assert snapshots.whole() == NAMES[:3]


def test_the_one_that_was_just_taken_stays_although_a_wrong_clock_has_left_later_names(
    snapshots: SnapshotFolder,
) -> None:
    write_whole(snapshots, *NAMES[:2], NAMES[4])
    assert snapshots.drop_older(NAMES[0], keep=2) == (NAMES[1],)
    assert snapshots.drop_older(NAMES[0], keep=1) == (NAMES[4],)
    assert snapshots.whole() == [NAMES[0]]


def test_what_exports_have_left_is_deleted_and_nothing_else(snapshots: SnapshotFolder) -> None:
    write_whole(snapshots, NAMES[0])
    write_unfinished(snapshots, NAMES[1])
    (snapshots.folder / f".{NAMES[0]}.lock").touch()
    (snapshots.folder / f".{NAMES[2]}.deleted").mkdir()  # by a coordinator that was killed meanwhile
    for somebody_elses in ("mine.partial", "notes"):
        (snapshots.folder / somebody_elses).mkdir()
    snapshots.tidy()
    assert names_in(snapshots) == [NAMES[0], "mine.partial", "notes", "run.txt"]


def test_an_export_that_still_goes_on_is_left_alone(snapshots: SnapshotFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.snapshot_folder.LEAVE_PATIENCE_S", 0.0)
    write_unfinished(snapshots, NAMES[1])
    claim = FolderClaim(folder=snapshots.folder, lock=f".{NAMES[1]}.lock", role="export", flag="--out")
    with claimed(claim), pytest.raises(ConfigError, match=rf"{NAMES[1]} is in use by a `export`, process"):
        snapshots.tidy()
    assert f"{NAMES[1]}.partial" in names_in(snapshots)
    snapshots.tidy()
    assert names_in(snapshots) == ["run.txt"]


def test_a_folder_is_of_one_run(snapshots: SnapshotFolder) -> None:
    snapshots.open()
    with pytest.raises(ConfigError, match=r"snapshots: .*snapshots is for those of run run-1; name another folder"):
        SnapshotFolder(snapshots.folder, "run-2").open()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot use folder .*file/snapshots: Not a directory"):
        SnapshotFolder(tmp_path / "file" / "snapshots", "run-1").open()
