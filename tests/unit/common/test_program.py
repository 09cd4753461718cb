"""A command that is told can be typed: however the program was installed, and wherever its owner stands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.program import program_name


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment with the command, of which PATH knows nothing."""
    return made_environment(tmp_path / "venv", monkeypatch)


def made_environment(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for script in ("bin/kilohive", "lib/site-packages/run_node.py"):
        (prefix / script).parent.mkdir(parents=True)
        (prefix / script).touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "executable", str(prefix / "bin/python"))
    monkeypatch.setenv("PATH", "/nowhere")
    return prefix


def called(program: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [str(program), "host"])
    return program_name()


def test_in_a_checkout_it_is_the_script(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(Path("run_node.py"), monkeypatch) == "python run_node.py"
    assert called(environment.parent / "run_node.py", monkeypatch) == "python run_node.py"


def test_installed_it_is_the_command_where_that_is_found(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/nowhere:{environment / 'bin'}")
    assert called(environment / "bin/kilohive", monkeypatch) == "kilohive"


def test_a_link_to_the_command_that_is_found_is_the_command(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = environment.parent / "links"
    links.mkdir()
    (links / "kilohive").symlink_to(environment / "bin/kilohive")
    monkeypatch.setenv("PATH", str(links))
    assert called(links / "kilohive", monkeypatch) == "kilohive"


def test_where_the_command_is_not_found_it_is_its_path(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = environment / "bin/kilohive"
    assert called(command, monkeypatch) == str(command)
    monkeypatch.chdir(environment)
    assert called(Path("bin/kilohive"), monkeypatch) == "bin/kilohive"


def test_where_another_command_of_that_name_is_found_it_is_the_path(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = environment.parent / "other bin"
    other.mkdir()
    (other / "kilohive").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(other))
    assert called(environment / "bin/kilohive", monkeypatch) == str(environment / "bin/kilohive")
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert called(other / "kilohive", monkeypatch) == f"'{other / 'kilohive'}'"


def test_a_node_that_an_installed_swarm_started_names_the_command(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = environment / "lib/site-packages/run_node.py"
    assert called(script, monkeypatch) == str(environment / "bin/kilohive")
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert called(script, monkeypatch) == "kilohive"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("uv/archive-v0/Cx", "uvx kilohive"),
        ("uv/environments-v2/kilohive-1", "uvx kilohive"),
        ("pipx/.cache/1a9", "pipx run kilohive"),
    ],
)
def test_in_an_environment_that_its_runner_forgets_it_is_the_runner(
    folder: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = made_environment(tmp_path / folder, monkeypatch)
    monkeypatch.setenv("PATH", str(prefix / "bin"))
    assert called(prefix / "bin/kilohive", monkeypatch) == words


def test_in_another_program_it_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(Path("/usr/bin/pytest"), monkeypatch) == "kilohive"
