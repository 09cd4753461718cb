"""Whether this machine runs on its battery.

Linux tells it in files. psutil reads them too, but takes any battery for the machine's, also that of a wireless mouse,
and knows an adapter only by two names: it is asked on other systems alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SUPPLIES = Path("/sys/class/power_supply")
MAX_SUPPLIES = 64
MAX_WORD_BYTES = 64

ON_BATTERY = Finding(against="the machine runs on its battery")
ON_MAINS = Finding()


def power_look(platform: str = sys.platform) -> Callable[[], Finding]:
    """What looks at the power of a machine of this platform."""
    return look_at_supplies if platform.startswith("linux") else look_at_psutil


@dataclass(frozen=True, kw_only=True)
class _Supply:
    """What Linux tells of an adapter or a battery; "" where it does not."""

    kind: str
    scope: str
    online: str
    status: str

    @property
    def is_own_battery(self) -> bool:
        """Whether the machine itself can run on it, a computer's battery or a UPS: a mouse's has the scope `Device`."""
        return self.kind in {"Battery", "UPS"} and self.scope != "Device"


def look_at_supplies(folder: Path = SUPPLIES) -> Finding:
    """Look at the files of Linux. A machine without a battery is on mains."""
    try:
        supplies = [_read_supply(path) for path in islice(folder.iterdir(), MAX_SUPPLIES)]
    except OSError as error:
        return _unknown(f"{folder} cannot be read: {error.strerror}")
    return _judge(supplies)


def _judge(supplies: Sequence[_Supply]) -> Finding:
    batteries = [supply for supply in supplies if supply.is_own_battery]
    adapters = [supply.online for supply in supplies if supply.kind == "Mains" and supply.online]
    if not batteries or "1" in adapters:
        return ON_MAINS
    # Some machines name no adapter, those charged over USB among them: their batteries tell.
    if adapters or any(battery.status == "Discharging" for battery in batteries):
        return ON_BATTERY
    if all(battery.status in {"", "Unknown"} for battery in batteries):
        return _unknown("it tells neither of an adapter nor whether its battery discharges")
    return ON_MAINS


def _read_supply(path: Path) -> _Supply:
    kind, scope, online, status = (_read_word(path / name) for name in ("type", "scope", "online", "status"))
    return _Supply(kind=kind, scope=scope, online=online, status=status)


def _read_word(path: Path) -> str:
    """What a file of one word holds; "" where there is none, or where the driver fails."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_WORD_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""


def look_at_psutil() -> Finding:
    """Look where the machine is no Linux."""
    sensors = getattr(psutil, "sensors_battery", None)
    if sensors is None:
        return _unknown("this system does not tell")
    battery = sensors()
    if battery is None or battery.power_plugged:
        return ON_MAINS
    if battery.power_plugged is None:
        return _unknown("its battery does not tell whether it discharges")
    return ON_BATTERY


def _unknown(why: str) -> Finding:
    return Finding(unknown=f"whether this machine runs on its battery is not known ({why}): it counts as on mains")
