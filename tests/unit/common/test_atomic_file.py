"""Files on file systems that keep no permissions: what is no secret is written, a secret is refused in a sentence."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from common.atomic_file import keeps_permissions, sync_folder, write_atomically

if TYPE_CHECKING:
    from pathlib import Path


def refuse(*_arguments: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_mode_that_cannot_be_set_keeps_nothing_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fchmod", refuse)
    write_atomically(tmp_path / "invite.txt", b"for all")
    write_atomically(tmp_path / "token", b"secret", mode=0o600)  # as it is made with that mode
    assert (tmp_path / "invite.txt").read_bytes() == b"for all"
    assert (tmp_path / "token").read_bytes() == b"secret"
    assert keeps_permissions(tmp_path)


def test_a_secret_is_not_written_where_others_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_none(descriptor: int, _mode: int) -> None:
        set_mode(descriptor, 0o755)

    set_mode = os.fchmod
    monkeypatch.setattr(os, "fchmod", keep_none)
    write_atomically(tmp_path / "invite.txt", b"for all")
    with pytest.raises(PermissionError, match="its file system keeps no permissions") as refused:
        write_atomically(tmp_path / "token", b"secret", mode=0o600)
    assert refused.value.filename == str(tmp_path / "token")
    assert [path.name for path in tmp_path.iterdir()] == ["invite.txt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    sync_folder(tmp_path)


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
