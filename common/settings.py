"""Checks on what a person set: one sentence that names the flag and the limit, before anything is started."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_minimums(config: object, minimums: Mapping[str, float]) -> None:
    """Raise ConfigError for the first field of `config` that is below its minimum, or not finite."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if not math.isfinite(value) or value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')}: must be {minimum:g} or more, is {value:g}")
