from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import CheckpointError
from node.model.checkpoint import previous_path, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, value: float) -> None:
    write_checkpoint(path, {"w": torch.full((3,), value)}, {"value": str(value)})


def test_nothing_written_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "a.safetensors") is None


def test_the_newest_is_read_and_the_one_before_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    for value in (1.0, 2.0, 3.0):
        write(path, value)
    stored, before = read_checkpoint(path), read_checkpoint(previous_path(path))
    assert stored is not None
    assert before is not None
    assert stored[1]["value"] == "3.0"
    assert torch.equal(stored[0]["w"], torch.full((3,), 3.0))
    assert before[1]["value"] == "2.0"


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff" * 64])
def test_a_damaged_file_falls_back_to_the_previous_one(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    write(path, 2.0)
    path.write_bytes(damage)
    stored = read_checkpoint(path)
    assert stored is not None
    assert stored[1]["value"] == "1.0"


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    path.replace(previous_path(path))
    stored = read_checkpoint(path)
    assert stored is not None
    assert stored[1]["value"] == "1.0"


def test_a_truncated_file_without_a_previous_one_is_one_clear_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, 1.0)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*a\.safetensors .* delete it to start afresh"):
        read_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write(path, 1.0)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the previous one is untouched"):
        write(path, 2.0)
    monkeypatch.undo()
    stored = read_checkpoint(path)
    assert stored is not None
    assert stored[1]["value"] == "1.0"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
