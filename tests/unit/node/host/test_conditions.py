"""Which conditions an owner's limits come to, and the hours, which are in no module of their own."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from node.host.conditions import conditions_of, look_at_schedule
from node.host.owner_pause import OwnerPause
from node.limits.finding import Finding
from node.limits.limits import Limits
from node.limits.process_usage import ProcessUse
from node.limits.schedule import Schedule
from tests.support.swarm_parts import CPU

if TYPE_CHECKING:
    from pathlib import Path

NIGHT = Schedule.parse("22:00-07:00")
CUDA = torch.device("cuda:1")


@pytest.mark.parametrize(
    ("limits", "device", "reasons"),
    [
        (Limits(), CPU, ["owner", "battery"]),
        (Limits(on_battery=True), CPU, ["owner"]),
        (Limits(schedule=NIGHT, on_battery=True), CPU, ["owner", "schedule"]),
        (Limits(only_when_idle=True, on_battery=True), CPU, ["owner", "processors", "person"]),
        (Limits(not_while=("steam",)), CPU, ["owner", "battery", "program"]),
        (Limits(not_while_gpu_percent=25.0, on_battery=True), CUDA, ["owner", "gpu"]),
        (Limits(not_while_gpu_percent=25.0, on_battery=True), CPU, ["owner"]),
    ],
)
def test_an_owner_who_sets_no_condition_is_asked_for_mains_alone(
    limits: Limits, device: torch.device, reasons: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def properties(asked: torch.device) -> Any:
        assert asked == CUDA
        return SimpleNamespace(uuid="5a1bd0c5-7b9e-43a5-a1ae-9d6f2b0e6b11")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    conditions = list(conditions_of(limits, OwnerPause(tmp_path), ProcessUse(), device))
    assert [condition.reason for condition in conditions] == reasons
    assert all(condition.every_s >= 1 for condition in conditions)


@pytest.mark.parametrize(
    ("hour", "finding"), [(23, Finding()), (6, Finding()), (12, Finding("it is outside its schedule"))]
)
def test_outside_its_hours_a_host_does_not_work(hour: int, finding: Finding) -> None:
    moment = time.struct_time((2026, 11, 25, hour, 0, 0, 2, 329, 0))
    assert look_at_schedule(NIGHT, lambda: moment) == finding


def test_the_owners_pause_is_a_condition_that_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "pause.json").write_text('{"until_s": 4600}')
    now_s = [1000.0]
    owner = next(conditions_of(Limits(), OwnerPause(tmp_path, lambda: now_s[-1]), ProcessUse(), CPU))
    assert (owner.look().against, owner.until_s()) == ("its owner paused it", 4600.0)
    now_s.append(4600.0)
    assert (owner.look().against, owner.until_s()) == ("", None)
