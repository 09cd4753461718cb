"""The folder of p2pd's sockets: short whatever TMPDIR is, and cleared only when nobody listens there any more."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from dht import daemon


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder that stands for /tmp."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(1)
    return server


def aged(folder: Path) -> Path:
    os.utime(folder, (time.time() - 2 * daemon.STALE_FOLDER_S,) * 2)
    return folder


def test_a_long_tmpdir_gives_a_short_path_all_the_same(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    assert daemon._folder_of_folders() == temporary
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("long" * 30)))
    assert daemon._folder_of_folders() == daemon.SHORT_FOLDER
    temporary.rmdir()


def test_dead_sockets_go_and_live_ones_and_other_files_stay(temporary: Path) -> None:
    folders = dead, live, other, new = [temporary / f"{daemon.FOLDER_PREFIX}{n}" for n in range(4)]
    for folder in folders:
        folder.mkdir(mode=0o700)
    for folder in (dead, new):
        listening(folder / "p2pd.sock").close()
        listening(folder / "client.sock").close()
    listening(live / "p2pd.sock").close()
    (other / "p2pd.sock").touch()
    with listening(live / "client.sock"):
        for folder in (dead, live, other):
            aged(folder)
        daemon._remove_stale_folders()
        assert [folder.exists() for folder in folders] == [False, True, True, True]
        assert len(list(live.iterdir())) == 2
    for folder in (live, other, new):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    temporary.rmdir()


def test_a_node_that_runs_is_not_called_by_one_that_starts(temporary: Path) -> None:
    folder = temporary / f"{daemon.FOLDER_PREFIX}live"
    folder.mkdir(mode=0o700)
    with listening(folder / "p2pd.sock"), listening(folder / "client.sock") as of_the_node:
        of_the_node.setblocking(False)  # noqa: FBT003 - the name of socket's method
        aged(folder)
        daemon._remove_stale_folders()
        with pytest.raises(BlockingIOError):
            of_the_node.accept()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    temporary.rmdir()
