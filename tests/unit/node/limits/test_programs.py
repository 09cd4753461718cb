"""Programs beside which a host must not work, among processes as a test has them and as this machine has them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import pytest

from node.limits import programs as programs_module
from node.limits.finding import Finding
from node.limits.programs import Programs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OWN_PID = 100


@dataclass
class FakeProcess:
    pid: int
    program: str
    state: str = psutil.STATUS_SLEEPING
    above: Sequence[FakeProcess] = field(default_factory=list)
    gone: bool = False

    def name(self) -> str:
        if self.gone:
            raise psutil.NoSuchProcess(self.pid)
        return self.program

    def status(self) -> str:
        return self.state

    def parents(self) -> Sequence[FakeProcess]:
        return self.above


INIT = FakeProcess(1, "systemd")
SHELL = FakeProcess(50, "bash", above=[INIT])
OWN = FakeProcess(OWN_PID, "python3", above=[SHELL, INIT])


def look(names: Sequence[str], *processes: FakeProcess) -> Finding:
    return Programs(names, lambda: [INIT, SHELL, OWN, *processes], OWN_PID).look()


@pytest.mark.parametrize(
    ("names", "running", "against"),
    [
        (["steam", "blender"], ["firefox"], ""),
        (["steam", "blender"], ["steam"], "steam runs"),
        (["steam", "blender"], ["steam", "blender", "steam"], "blender and steam run"),
        (["Steam"], ["steam"], "Steam runs"),
        (["steam"], ["steamwebhelper", "mysteam"], ""),
    ],
)
def test_a_program_of_the_list_is_known_by_its_whole_name(names: list[str], running: list[str], against: str) -> None:
    assert look(names, *(FakeProcess(200 + i, name) for i, name in enumerate(running))) == Finding(against)


def test_a_hosts_own_processes_do_not_stop_it_but_those_it_was_started_from_do() -> None:
    child = FakeProcess(101, "p2pd", above=[OWN, SHELL, INIT])
    grandchild = FakeProcess(102, "loginctl", above=[child, OWN, SHELL, INIT])
    assert look(["python3", "p2pd", "loginctl"], child, grandchild) == Finding()
    assert look(["python3", "bash"], FakeProcess(103, "python3")) == Finding("bash and python3 run")


def test_what_has_ended_meanwhile_and_what_nobody_has_waited_for_do_not_run() -> None:
    ended = FakeProcess(200, "steam", gone=True)
    zombie = FakeProcess(201, "steam", state=psutil.STATUS_ZOMBIE)
    assert look(["steam"], ended, zombie) == Finding()


def test_a_look_reads_no_more_processes_than_its_bound_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "MAX_PROCESSES", 5)
    crowd = [FakeProcess(200 + i, "worker") for i in range(10)]
    finding = look(["steam"], *crowd, FakeProcess(300, "steam"))
    assert finding.against == ""
    assert finding.unknown.startswith("this machine runs 5 programs or more")


def test_where_other_users_processes_are_hidden_that_is_said() -> None:
    finding = Programs(["steam"], lambda: [SHELL, OWN], OWN_PID).look()
    assert finding == Finding(
        "", "this machine hides the processes of other users: only those of this user count for not_while"
    )


def test_a_program_of_this_machine_is_found_while_it_runs(tmp_path: Path) -> None:
    program = tmp_path / "kilohive-game"
    program.symlink_to(sys.executable)
    looks = Programs([program.name], own_pid=1 << 30)
    assert looks.look().against == ""
    game = subprocess.Popen([program, "-ISc", "input()"], stdin=subprocess.PIPE)
    with game:
        assert looks.look().against == "kilohive-game runs"
        assert Programs([program.name], own_pid=os.getpid()).look().against == "", "it descends from this process"
        game.communicate(b"\n", timeout=20)
    assert looks.look().against == ""
