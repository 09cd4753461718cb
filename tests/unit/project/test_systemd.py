"""docs/systemd: each unit starts a command that there is, with flags that it has, and may do little else."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_node
from common.command_line import parse
from node.host.config import HostConfig
from node.limits.limits import Limits

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "systemd"
SYSTEM = sorted(FOLDER.glob("*.service"))
USER = FOLDER / "user" / "kilohive-host.service"
HOSTS = (FOLDER / "kilohive-host.service", USER)
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="there is no systemd-analyze")
every_unit = pytest.mark.parametrize("unit", [*SYSTEM, USER], ids=lambda unit: f"{unit.parent.stem}-{unit.stem}")
both_hosts = pytest.mark.parametrize("unit", HOSTS, ids=["system", "user"])
GRACE_S = 20
"""As long as a host may take to hand its blocks over."""


def section(unit: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys are not lower case
    parser.read_string(unit.read_text(encoding="utf-8"))
    return dict(parser[name])


def words_of(unit: Path) -> list[str]:
    """The command line after the program."""
    program, *words = shlex.split(section(unit, "Service")["ExecStart"])
    if program.endswith("/bin/kilohive"):
        return words
    assert program.endswith("/.venv/bin/python")
    assert words[0] == "run_node.py"
    return words[1:]


def test_there_is_one_for_each_who_runs_for_long() -> None:
    assert [unit.stem for unit in SYSTEM] == ["kilohive-coordinator", "kilohive-host", "kilohive-lighthouse"]
    assert USER.exists()


@every_unit
def test_its_command_can_be_typed(unit: Path) -> None:
    name, *flags = words_of(unit)
    assert name == unit.stem.removeprefix("kilohive-")
    (command,) = [command for command in run_node.COMMANDS if command.name == name]
    parsed = parse(command, flags, "kilohive")
    assert ("listen" in parsed.given) is (name != "host")
    assert command.endless, "it is started again when it ends"


@pytest.mark.parametrize("unit", SYSTEM, ids=lambda unit: unit.stem)
def test_it_may_write_its_own_folder_alone(unit: Path) -> None:
    service = section(unit, "Service")
    assert (service["User"], service["ProtectSystem"], service["NoNewPrivileges"]) == ("kilohive", "strict", "yes")
    folder = f"/var/lib/{service['StateDirectory']}/"
    assert folder in service["ExecStart"]
    assert section(unit, "Install") == {"WantedBy": "multi-user.target"}


@both_hosts
def test_a_volunteers_host_is_a_guest(unit: Path) -> None:
    host = next(command for command in run_node.COMMANDS if command.name == "host")
    limits = Limits.of(parse(host, words_of(unit)[1:], "kilohive").config)
    assert limits.memory_bytes
    assert limits.up_bytes_per_s
    assert limits.cpu_percent
    service = section(unit, "Service")
    assert int(service["Nice"]) > 0
    assert int(service["CPUWeight"]) < 100


@both_hosts
def test_a_volunteers_host_has_time_to_leave_and_is_not_started_again_after_a_mistake(unit: Path) -> None:
    service = section(unit, "Service")
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > GRACE_S
    assert service["Restart"] == "on-failure"
    assert int(service["RestartPreventExitStatus"]) == run_node.EXIT_USAGE


@both_hosts
def test_a_volunteers_host_may_do_what_torch_and_p2pd_need(unit: Path) -> None:
    service = section(unit, "Service")
    assert {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"} == set(service["RestrictAddressFamilies"].split())
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "ProcSubset"} & service.keys()


def test_under_an_account_of_its_own_it_is_steered_without_a_flag() -> None:
    host = next(command for command in run_node.COMMANDS if command.name == "host")
    assert parse(host, words_of(USER)[1:], "kilohive").config.state == HostConfig().state
    assert section(USER, "Install") == {"WantedBy": "default.target"}


def that_could_be_started(unit: Path, folder: Path) -> Path:
    """A copy whose program is on this machine, wherever Kilohive is."""
    copy = folder / unit.name
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(encoding="utf-8")))
    return copy


def analyzed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run(
        (str(ANALYZE), *arguments), env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@needs_systemd
@every_unit
def test_systemd_understands_every_line(unit: Path, tmp_path: Path) -> None:
    whose = ("--user",) if unit is USER else ()
    verified = analyzed(tmp_path, *whose, "verify", "--man=no", str(that_could_be_started(unit, tmp_path)))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_a_volunteers_host_well_shut_in(tmp_path: Path) -> None:
    copy = that_could_be_started(HOSTS[0], tmp_path)
    secure = analyzed(tmp_path, "security", "--no-pager", "--offline=yes", "--threshold=25", str(copy))
    assert secure.returncode == 0, secure.stdout + secure.stderr
