"""The folder of p2pd's sockets: short whatever TMPDIR is, and cleared only when nobody listens there any more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from dht import socket_folder

ROOT = Path(__file__).resolve().parents[3]
NODE = """
import socket, sys, tempfile, time
from dht.socket_folder import SocketFolder
tempfile.tempdir = sys.argv[1]
folder = SocketFolder()
servers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
for server, name in zip(servers, ("p2pd.sock", "client.sock")):
    server.bind(str(folder.path / name))
    server.listen(1)
folder.key_file.touch()
print(folder.path, flush=True)
time.sleep(60)
"""


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
    os.utime(folder, (time.time() - 2 * socket_folder.STALE_FOLDER_S,) * 2)
    return folder


def test_a_long_tmpdir_gives_a_short_path_all_the_same(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    assert socket_folder.parents()[0] == temporary
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("long" * 30)))
    assert socket_folder.parents()[0] == socket_folder.SHORT_FOLDER
    temporary.rmdir()


def test_dead_sockets_go_and_live_ones_and_other_files_stay(temporary: Path) -> None:
    folders = dead, live, other, new = [temporary / f"{socket_folder.FOLDER_PREFIX}{n}" for n in range(4)]
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
        socket_folder.remove_stale_folders()
        assert [folder.exists() for folder in folders] == [False, True, True, True]
        assert len(list(live.iterdir())) == 2
    for folder in (live, other, new):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    temporary.rmdir()


def test_a_node_that_runs_is_not_called_by_one_that_starts(temporary: Path) -> None:
    folder = temporary / f"{socket_folder.FOLDER_PREFIX}live"
    folder.mkdir(mode=0o700)
    with listening(folder / "p2pd.sock"), listening(folder / "client.sock") as of_the_node:
        of_the_node.setblocking(False)  # noqa: FBT003 - the name of socket's method
        aged(folder)
        socket_folder.remove_stale_folders()
        with pytest.raises(BlockingIOError):
            of_the_node.accept()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    temporary.rmdir()


def test_the_folder_of_a_killed_node_goes_at_once_and_that_of_a_living_one_stays(temporary: Path) -> None:
    nodes = [
        subprocess.Popen([sys.executable, "-c", NODE, str(temporary)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, living = (Path(node.stdout.readline().strip()) for node in nodes if node.stdout is not None)
        nodes[0].kill()
        nodes[0].wait()
        own = socket_folder.SocketFolder()
        socket_folder.remove_stale_folders()
        assert [folder.exists() for folder in (killed, living, own.path)] == [False, True, True]
        assert {path.name for path in living.iterdir()} == {"p2pd.sock", "client.sock", "identity.key"}
    finally:
        for node in nodes:
            node.kill()
            node.communicate()
    own.remove()  # and so does a node that ends
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


def test_a_place_that_cannot_be_written_or_takes_no_sockets_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setattr(socket_folder, "SHORT_FOLDER", temporary / "missing")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    folder = socket_folder.SocketFolder()
    assert folder.path.parent == temporary
    folder.remove()

    def no_sockets(_path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket_folder, "_try_socket", no_sockets)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(ConfigError) as refused:
        socket_folder.SocketFolder()
    assert str(refused.value) == (
        f"no folder for the sockets of p2pd ({temporary}: takes no sockets: Operation not permitted); set TMPDIR to a "
        "folder that you can write to, with a path of at most 60 bytes"
    )
    assert list(temporary.iterdir()) == []
    temporary.rmdir()
