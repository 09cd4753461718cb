"""Lengths of time as people write them: 45s, 30m, 2h, 1h30m, 3d."""

from __future__ import annotations

import re

from common.errors import ConfigError

_UNITS_S = (86_400, 3600, 60, 1)
_DURATION = re.compile(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?", re.IGNORECASE)


def parse_duration(name: str, text: str) -> int:
    """Seconds; raises ConfigError naming `name` for what is no duration, or none of a second or more."""
    match = _DURATION.fullmatch(text.strip())
    seconds = sum(int(n or 0) * unit_s for n, unit_s in zip(match.groups(), _UNITS_S, strict=True)) if match else 0
    if not seconds:
        raise ConfigError(f"{name}: is {text[:40]!r}, must be such as 30m, 2h or 1h30m")
    return seconds
