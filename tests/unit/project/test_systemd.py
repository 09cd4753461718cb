"""docs/systemd: each unit starts a command that there is, with flags that it has, as a user without rights."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest

import run_node
from common.command_line import parse

UNITS = sorted((Path(__file__).resolve().parents[3] / "docs" / "systemd").glob("*.service"))


def section(unit: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys are not lower case
    parser.read_string(unit.read_text(encoding="utf-8"))
    return dict(parser[name])


def test_there_is_one_for_each_who_runs_for_long() -> None:
    assert [unit.stem for unit in UNITS] == ["kilohive-coordinator", "kilohive-host", "kilohive-lighthouse"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_its_command_can_be_typed(unit: Path) -> None:
    program, script, name, *flags = shlex.split(section(unit, "Service")["ExecStart"])
    assert program.endswith("/.venv/bin/python")
    assert script == "run_node.py"
    assert name == unit.stem.removeprefix("kilohive-")
    (command,) = [command for command in run_node.COMMANDS if command.name == name]
    parsed = parse(command, flags, "kilohive")
    assert ("listen" in parsed.given) is (name != "host")
    assert command.endless, "it is started again when it ends"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_it_may_write_its_own_folder_alone(unit: Path) -> None:
    service = section(unit, "Service")
    assert (service["User"], service["ProtectSystem"], service["NoNewPrivileges"]) == ("kilohive", "strict", "yes")
    folder = f"/var/lib/{service['StateDirectory']}/"
    assert folder in service["ExecStart"]
    assert section(unit, "Install") == {"WantedBy": "multi-user.target"}
