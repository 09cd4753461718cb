"""Folders that a node has for itself: one process at a time, told in a sentence, and never locked by the dead."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.folders import (
    FolderClaim,
    claimed,
    data_cache,
    give_matplotlib_a_folder,
    locked,
    state_folder,
    temporary_folder,
    wait_until_free,
)

os_access = os.access
ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import subprocess, sys, time
from pathlib import Path
from common.folders import FolderClaim, claimed
with claimed(FolderClaim(folder=Path(sys.argv[1]), role="host", flag="--state")):
    child = subprocess.Popen(["/bin/sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def claim(folder: Path, role: str = "host") -> FolderClaim:
    return FolderClaim(folder=folder, role=role, flag="--state")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_in_use_is_refused_by_a_sentence_that_names_who_has_it_and_the_way_out(tmp_path: Path) -> None:
    with claimed(claim(tmp_path)):
        before = contents(tmp_path)
        with pytest.raises(ConfigError) as same, claimed(claim(tmp_path)):
            pass
        with pytest.raises(ConfigError) as other, claimed(claim(tmp_path, "train")):
            pass
        assert contents(tmp_path) == before
    holder = f"`host`, process {os.getpid()}: stop that one, or choose another --state"
    assert str(same.value) == f"{tmp_path} is in use by another {holder}"
    assert str(other.value) == f"{tmp_path} is in use by a {holder}"
    assert same.value.exit_code == 2
    with claimed(claim(tmp_path)):
        pass


def test_a_holder_on_another_machine_or_one_that_has_not_named_itself_is_refused_too(tmp_path: Path) -> None:
    with claimed(claim(tmp_path)):
        claim(tmp_path).path.write_text("7 host elsewhere\n")
        with pytest.raises(ConfigError, match="another `host`, process 7 on elsewhere: stop that one"):
            wait_until_free(claim(tmp_path), 0.0)
        claim(tmp_path).path.write_bytes(b"")
        with pytest.raises(ConfigError, match="in use by another process: stop that one"):
            wait_until_free(claim(tmp_path), 0.0)


def test_a_killed_holder_leaves_no_lock_even_if_a_program_that_it_started_lives_on(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        child = int(holder.stdout.readline())
        with pytest.raises(ConfigError, match=f"process {holder.pid}: "), claimed(claim(tmp_path)):
            pass
    finally:
        holder.kill()
        holder.communicate()
    try:
        with claimed(claim(tmp_path)):
            os.kill(child, 0)
    finally:
        os.kill(child, 9)


def test_looking_whether_a_folder_is_free_makes_nothing(tmp_path: Path) -> None:
    wait_until_free(claim(tmp_path / "none"), 0.0)
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_node_warns_once_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(_file: object, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claimed(claim(tmp_path)):
        wait_until_free(claim(tmp_path), 0.0)
    (warning,) = caplog.messages
    assert warning == (
        f"{tmp_path}/node.lock: cannot be locked: No locks available; "
        "see to it yourself that no second process uses this folder"
    )
    with locked(tmp_path / "cache.lock"):
        assert "cache.lock: cannot be locked: No locks available" in caplog.messages[-1]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(ConfigError, match=r"cannot use folder .*file/state: Not a directory; choose another")
    with refused, claimed(claim(tmp_path / "file" / "state")):
        pass


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, without any variable that names a cache."""
    for name in ("KILOHIVE_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_cache_is_in_the_users_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    assert data_cache() == temporary / ".cache" / "kilohive"
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "xdg"))
    assert data_cache() == temporary / "xdg" / "kilohive"
    monkeypatch.setenv("KILOHIVE_CACHE", "/nowhere")
    assert data_cache() == Path("/nowhere")
    give_matplotlib_a_folder()
    assert "MPLCONFIGDIR" not in os.environ


@pytest.mark.parametrize("home", ["/proc/nobody", "/etc/passwd/home", None], ids=["read-only", "a file", "none"])
def test_without_a_home_the_cache_is_a_private_folder_and_the_variable_is_named(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str | None
) -> None:
    def no_entry(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr(os, "access", lambda path, mode: False if str(path) == "/proc" else os_access(path, mode))
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    folder = data_cache()
    assert folder == temporary / f"kilohive-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    problem = "HOME is not set" if home is None else f"{home}/.cache/kilohive cannot be written"
    assert caplog.messages == [
        f"{problem}, so prepared text is kept in {folder}; set KILOHIVE_CACHE to keep it elsewhere"
    ]
    assert data_cache() == folder  # again
    give_matplotlib_a_folder()
    assert os.environ["MPLCONFIGDIR"] == str(folder / "matplotlib")


def test_a_cache_that_somebody_else_has_put_among_temporary_files_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/etc/passwd/home")
    (temporary / "elsewhere").mkdir()
    (temporary / f"kilohive-cache-{os.getuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(ConfigError, match="belongs to somebody else; set KILOHIVE_CACHE to a folder that you can"):
        data_cache()


def test_without_a_folder_for_temporary_files_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match="no folder for temporary files can be written; set TMPDIR to one"):
        temporary_folder()


def test_a_nodes_usual_folder_is_the_same_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KILOHIVE_STATE", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert state_folder("host") == Path("/home/somebody/.local/share/kilohive/host")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert state_folder("host") == Path("/data/kilohive/host")
    monkeypatch.setenv("KILOHIVE_STATE", "/kilohive/state")
    assert state_folder("host") == Path("/kilohive/state/host")


def test_an_account_without_a_home_has_a_nodes_folder_where_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KILOHIVE_STATE", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert state_folder("host") == Path("state/host")


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
