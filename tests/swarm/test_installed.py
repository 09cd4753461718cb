"""Kilohive as people install it: built, installed into an environment of its own, and run far from the checkout."""

from __future__ import annotations

import json
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

import run_node
from experiments.live.processes import wait_until
from tests.support.docs import ROOT
from tests.support.installed import FILES, PACKAGES, Installed, build, install

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RUN = ("--experts", "16", "--experts-per-block", "8", "--d-model", "32", "--heads", "2", "--context", "32")
NOT_SOURCE = {"__pycache__"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(built[0], tmp_path_factory.mktemp("installed"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where nothing is."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def sources() -> set[str]:
    """What is in the packages of the checkout."""
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if not NOT_SOURCE & set(path.parts)}


def test_the_wheel_has_every_file_of_the_product_and_no_other(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources() | {"run_node.py", "kilohive.py"}
    assert {name.rpartition(".")[2] for name in names} == {"py", "pyi", "proto", "html", "typed"}


def test_the_sdist_has_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if not sdist.getmember(name).isdir()}
    made = {name for name in names if name.startswith("kilohive.egg-info/") or name in {"PKG-INFO", "setup.cfg"}}
    assert names - made == sources() | set(FILES)


def test_the_command_has_every_subcommand_and_is_named_as_it_was_called(installed: Installed, folder: Path) -> None:
    shown = installed.run(folder, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "\n  kilohive COMMAND [FLAGS]" in shown.stdout
    assert all(f"\n  {command.name} " in shown.stdout for command in run_node.COMMANDS)
    by_path = {**installed.variables(), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [installed.command, "pause", "--help"], env=by_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{installed.command} pause:")


def test_a_swarm_trains(installed: Installed, folder: Path) -> None:
    text = folder.parent / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 400)
    small = ("--steps", "3", "--eval-every", "0", "--hosts", "2", "--batch", "2", "--micro-batches", "1", "--plain")
    done = installed.run(folder, "local", *RUN, *small, "--data", str(text), "--out", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run/summary.json").read_text())["steps"] == 3
    assert "See it from outside: kilohive status --join run/swarm.toml" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["run"]


def test_a_volunteer_types_an_invite_and_nothing_else(installed: Installed, folder: Path, tmp_path: Path) -> None:
    owner, log, elsewhere = tmp_path / "owner", tmp_path / "log.txt", tmp_path / "elsewhere"
    owner.mkdir()
    elsewhere.mkdir()
    invite = owner / "run/invite.txt"
    with installed.started(owner, tmp_path / "coordinator.txt", "coordinator", "--out", "run", *RUN):
        wait_until(invite.exists, "the invite")
        with installed.started(folder, log, "host", "--join", invite.read_text().strip()) as host:
            wait_until(lambda: "at most " in log.read_text(), f"the host serves; its log is {log}")
            state = installed.home / ".local/share/kilohive/host"
            assert f"kept in {state}, from which the next start goes on" in log.read_text()
            assert "Ctrl+C stops it; from another terminal `kilohive pause` and `kilohive resume`" in log.read_text()
            for word, answer in (("health", "SERVING"), ("pause", "paused"), ("resume", "it works"), ("leave", "left")):
                done = installed.run(elsewhere, word)
                assert done.returncode == 0, done.stderr
                assert answer in done.stdout
            assert host.wait(timeout=30) == 0
    assert (state / "identity.key").stat().st_mode & 0o777 == 0o600
    assert list(folder.iterdir()) == list(elsewhere.iterdir()) == []
