"""On mains or on the battery, as Linux and psutil tell it of machines that there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from node.limits.power import ON_BATTERY, ON_MAINS, look_at_psutil, look_at_supplies, power_look

if TYPE_CHECKING:
    from pathlib import Path

    from node.limits.finding import Finding

BATTERY = {"type": "Battery", "present": "1"}
ADAPTER_IN, ADAPTER_OUT = {"type": "Mains", "online": "1"}, {"type": "Mains", "online": "0"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "55"}
"""A wireless mouse, which Linux names hidpp_battery_0."""

UPS = {"type": "UPS", "scope": "System", "status": "Discharging"}
USB_PORT = {"type": "USB", "online": "0"}


def supplies(folder: Path, *told: dict[str, str]) -> Path:
    for index, files in enumerate(told):
        (folder / f"supply{index}").mkdir()
        for name, text in files.items():
            (folder / f"supply{index}" / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("told", "finding"),
    [
        pytest.param((), ON_MAINS, id="a desktop"),
        pytest.param((MOUSE,), ON_MAINS, id="a desktop with a wireless mouse"),
        pytest.param((ADAPTER_OUT,), ON_MAINS, id="a small computer whose adapter is not told right"),
        pytest.param((BATTERY | {"status": "Charging"}, ADAPTER_IN), ON_MAINS, id="a laptop that is plugged in"),
        pytest.param((BATTERY | {"status": "Discharging"}, ADAPTER_IN), ON_MAINS, id="one with a weak adapter"),
        pytest.param((BATTERY | {"status": "Discharging"}, ADAPTER_OUT), ON_BATTERY, id="a laptop that is not"),
        pytest.param((BATTERY | {"status": "Full"}, ADAPTER_OUT), ON_BATTERY, id="one that was unplugged just now"),
        pytest.param((BATTERY | {"status": "Discharging"}, USB_PORT), ON_BATTERY, id="one that is charged over USB"),
        pytest.param((BATTERY | {"status": "Not charging"}, USB_PORT), ON_MAINS, id="the same, plugged in and full"),
        pytest.param(
            (BATTERY | {"status": "Unknown"}, BATTERY | {"status": "Discharging"}), ON_BATTERY, id="two batteries"
        ),
        pytest.param((UPS,), ON_BATTERY, id="a desktop at a UPS without power"),
    ],
)
def test_linux_tells_what_a_machine_runs_on(told: tuple[dict[str, str], ...], finding: Finding, tmp_path: Path) -> None:
    assert look_at_supplies(supplies(tmp_path, *told)) == finding


def test_a_battery_that_tells_nothing_is_not_known_and_counts_as_mains(tmp_path: Path) -> None:
    finding = look_at_supplies(supplies(tmp_path, BATTERY | {"status": "Unknown"}, BATTERY))
    assert finding.against == ""
    assert finding.unknown.startswith("whether this machine runs on its battery is not known (it tells neither")
    assert finding.unknown.endswith("it counts as on mains")


def test_a_machine_without_the_files_is_one_sentence(tmp_path: Path) -> None:
    finding = look_at_supplies(tmp_path / "power_supply")
    assert finding.against == ""
    assert "power_supply cannot be read: No such file or directory" in finding.unknown


@pytest.mark.parametrize(
    ("told", "against", "unknown"),
    [
        pytest.param(None, "", "", id="no battery"),
        pytest.param(True, "", "", id="plugged in"),
        pytest.param(False, "the machine runs on its battery", "", id="on battery"),
        pytest.param(None, "", "does not tell whether it discharges", id="nobody knows"),
    ],
)
def test_other_systems_are_asked_through_psutil(
    told: bool | None, against: str, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    battery = SimpleNamespace(power_plugged=told) if told is not None or unknown else None
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery)
    finding = power_look("darwin")()
    assert finding.against == against
    assert unknown in finding.unknown


def test_a_system_of_which_psutil_knows_nothing_counts_as_mains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_battery")
    assert "this system does not tell" in look_at_psutil().unknown
    assert power_look("linux") is look_at_supplies
