"""An export that is ended anywhere goes on, to the same bytes; what is not one is left alone."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common import atomic_file
from common.errors import CheckpointError, ConfigError
from node.export import unfinished as module
from node.export.unfinished import Taken
from protocol.manifest import BlockId
from tests.support.exported import (
    CARD,
    HASH,
    TAKEN,
    contents,
    exported,
    flipped,
    part_tensors,
    random_model,
    unfinished_export,
    write_export,
)
from tests.support.swarm_parts import small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.model.moe import LocalExperts
    from node.model.trunk import Trunk
MANIFEST = small_manifest(model=HASH)
MAX_BYTES = 20_000
"""A trunk in several files, and blocks of which two go into one."""


class KilledError(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def model() -> tuple[Trunk, LocalExperts]:
    return random_model(MANIFEST)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "model"
    exported(out, MANIFEST, max_bytes=MAX_BYTES)
    return contents(out)


def export(out: Path, of: tuple[Trunk, LocalExperts]) -> None:
    write_export(unfinished_export(out, MANIFEST, MAX_BYTES), MANIFEST, of, None)


class Steps:
    """What changes on the disk, counted; at one step the process is ended, before it or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.end_at, self.is_after = 0, -1, False
        for owner, name in (
            (module, "write_atomically"),
            (Path, "unlink"),
            (Path, "rename"),
            (shutil, "rmtree"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def begin(self, end_at: int, *, is_after: bool) -> None:
        self.n, self.end_at, self.is_after = 0, end_at, is_after

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            self.n += 1
            ends = self.n == self.end_at
            if ends and not self.is_after:
                raise KilledError
            result = function(*arguments, **keywords)
            if ends:
                raise KilledError
            return result

        return step


@pytest.mark.parametrize("is_after", [False, True])
def test_whatever_step_it_is_killed_at_it_goes_on_to_the_same_bytes(
    tmp_path: Path,
    model: tuple[Trunk, LocalExperts],
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    is_after: bool,
) -> None:
    steps = Steps(monkeypatch)
    export(tmp_path / "counted", model)
    n_steps = steps.n
    assert n_steps > 40
    for number in range(1 + is_after, n_steps + 1, 9):
        out = tmp_path / f"{number}" / "model"
        out.parent.mkdir()
        steps.begin(number, is_after=is_after)
        with pytest.raises(KilledError):
            export(out, model)
        if out.exists():
            assert contents(out) == wanted
        steps.begin(-1, is_after=False)
        export(out, model)
        assert contents(out) == wanted
        assert list(out.parent.iterdir()) == [out]


def test_one_that_was_killed_before_its_last_step_is_whole(tmp_path: Path, model: tuple[Trunk, LocalExperts]) -> None:
    export(tmp_path / "model", model)
    left_over = tmp_path / "model.partial"
    left_over.mkdir()
    export(tmp_path / "model", model)
    assert not left_over.exists()
    with pytest.raises(ConfigError, match="model is not empty"):
        export(tmp_path / "model", model)


def test_half_a_file_that_a_killed_process_left_does_not_come_along(
    tmp_path: Path, model: tuple[Trunk, LocalExperts], wanted: dict[str, bytes]
) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    (unfinished.folder / "model" / ".model-00001-of-00006.safetensors.x7a").write_bytes(b"half")
    export(tmp_path / "model", model)
    assert contents(tmp_path / "model") == wanted


def test_an_export_that_has_its_name_is_only_tidied_up(
    tmp_path: Path, model: tuple[Trunk, LocalExperts], wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.UnfinishedExport, "clear", killed)
        with pytest.raises(KilledError):
            export(tmp_path / "model", model)
    assert contents(tmp_path / "model") == wanted
    assert not unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES).begin()
    export(tmp_path / "model", model)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def killed(_: module.UnfinishedExport) -> None:
    raise KilledError


def test_what_had_come_is_not_fetched_again(tmp_path: Path, model: tuple[Trunk, LocalExperts]) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    assert unfinished.begin()
    first, second, *_ = unfinished.groups
    for part in (*first.parts, second.parts[0]):
        unfinished.keep(part, part_tensors(part, *model), TAKEN)
    unfinished.write(first)
    again = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    assert again.begin()
    assert again.record(first) == unfinished.record(first)
    assert [again.has(part) for part in second.parts] == [True, False, False, False]


@pytest.mark.parametrize("place", [9, -1])
def test_a_file_that_was_damaged_meanwhile_is_written_anew(
    tmp_path: Path, model: tuple[Trunk, LocalExperts], wanted: dict[str, bytes], place: int
) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    first = unfinished.groups[0]
    for part in first.parts:
        unfinished.keep(part, part_tensors(part, *model), TAKEN)
    unfinished.write(first)
    with flipped(unfinished.folder / "model" / first.files[0][0], place):
        assert unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES).record(first) is None
        with pytest.raises(CheckpointError, match="was damaged meanwhile"):
            unfinished.sums()
    export(tmp_path / "model", model)
    assert contents(tmp_path / "model") == wanted


def test_a_part_that_is_cut_short_or_of_other_shapes_counts_as_missing(
    tmp_path: Path, model: tuple[Trunk, LocalExperts]
) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    part, other = unfinished.groups[0].parts[0], unfinished.groups[1].parts[0]
    unfinished.keep(part, part_tensors(part, *model), TAKEN)
    path = unfinished.folder / "parts" / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not unfinished.has(part)
    unfinished.keep(part, part_tensors(other, *model), TAKEN)
    assert not unfinished.has(part)
    path.write_bytes(b"\xff" * 100)
    assert not unfinished.has(part)


@pytest.mark.parametrize("max_bytes", [MAX_BYTES, 10_000_000])
def test_an_unfinished_export_of_another_run_or_with_other_files_is_left_alone(tmp_path: Path, max_bytes: int) -> None:
    unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES).begin()
    run = small_manifest(model=HASH, seed=1) if max_bytes == MAX_BYTES else MANIFEST
    with pytest.raises(ConfigError, match=r"model.partial is no unfinished export of this run with these settings"):
        unfinished_export(tmp_path / "model", run, max_bytes).begin()


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    for name in ("model", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: .*model is not empty; name a folder that is not there yet"):
        unfinished_export(tmp_path / "model", MANIFEST).begin()
    with pytest.raises(ConfigError, match=r"--out: .*other.partial is no unfinished export"):
        unfinished_export(tmp_path / "other", MANIFEST).begin()
    with pytest.raises(ConfigError, match=r"--out: .*file: Not a directory"):
        unfinished_export(tmp_path / "file", MANIFEST).begin()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "file",
        "model",
        "other.partial",
        "thesis.tex",
        "thesis.tex",
    ]


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, model: tuple[Trunk, LocalExperts]) -> None:
    (tmp_path / "model").mkdir()
    export(tmp_path / "model", model)
    assert "config.json" in contents(tmp_path / "model")


def test_a_disk_that_fills_up_is_told_in_a_sentence_and_what_is_there_stays(
    tmp_path: Path, model: tuple[Trunk, LocalExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    part, other = (group.parts[0] for group in unfinished.groups[:2])
    unfinished.keep(part, part_tensors(part, *model), TAKEN)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"0-0.safetensors: cannot be written: No space left on device; what"):
        unfinished.keep(other, part_tensors(other, *model), TAKEN)
    assert unfinished.has(part)
    assert not unfinished.has(other)


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    unfinished.check_room()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(CheckpointError, match=r"model.partial: .* kB are still to be written, and 50 kB are free"):
        unfinished.check_room()


def test_what_reads_back_otherwise_than_it_was_written_is_an_error(
    tmp_path: Path, model: tuple[Trunk, LocalExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = atomic_file.write_atomically

    def badly(path: Path, data: bytes) -> None:
        write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name.startswith("model-") else data)

    monkeypatch.setattr(module, "write_atomically", badly)
    with pytest.raises(CheckpointError, match=r"00001-of-00006.safetensors: reads back as another file"):
        export(tmp_path / "model", model)


def test_where_each_part_came_from_is_kept(tmp_path: Path, model: tuple[Trunk, LocalExperts]) -> None:
    unfinished = unfinished_export(tmp_path / "model", MANIFEST, MAX_BYTES)
    unfinished.begin()
    wanted: dict[BlockId, Taken] = {}
    for group in unfinished.groups:
        for part in group.parts:
            assert isinstance(part.id, BlockId)
            wanted[part.id] = Taken(version=len(wanted), word="one replica", run_tokens=3)
            unfinished.keep(part, part_tensors(part, *model), wanted[part.id])
        unfinished.write(group)
        assert not any(unfinished.has(part) for part in group.parts)
    assert unfinished.taken() == wanted
    unfinished.finish({"README.md": CARD.encode()})
