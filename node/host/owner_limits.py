"""The limits that hold on a host: its command's and, where that names none, those that its owner set while it ran.

These are kept in a file of the host's folder, so that they hold after a restart too. What the command or its file of
--config names wins, and cannot be changed while the host runs.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from common.atomic_file import write_atomically
from common.errors import ConfigError, InvalidInputError, UnavailableError
from node.limits.config import LimitsConfig
from node.limits.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from node.host.config import HostConfig

    Setting = str | float | bool

logger = logging.getLogger(__name__)

LIMITS_FILE: Final = "limits.json"
MAX_FILE_BYTES: Final = 16_384
MAX_TEXT_CHARS: Final = 200
CHANGEABLE: Final[Mapping[str, Setting]] = {
    name: getattr(LimitsConfig(), name)
    for name in (
        "max_memory",
        "max_bandwidth_up",
        "max_bandwidth_down",
        "max_cpu_percent",
        "schedule",
        "only_when_idle",
        "on_battery",
    )
}
"""What takes effect while a host runs, with the values that set no limit."""

_TYPES: Final = {str: "a text", float: "a number", bool: "true or false"}


class OwnerLimits:
    """Of the host that was started with `given`. Reads the disk when it is made, and touches it in `keep` alone.

    Raises ConfigError for limits of the command that cannot be kept.
    """

    def __init__(self, given: HostConfig) -> None:
        Limits.of(given)  # a mistake of the command is its own
        self._given = given
        self.fixed = frozenset(name for name, default in CHANGEABLE.items() if getattr(given, name) != default)
        """Names of the limits that the command sets."""
        self._kept = _read(given.state)
        try:
            _ = self.limits
        except ConfigError as error:
            logger.warning("%s: is of no use, so it sets no limit: %s", given.state / LIMITS_FILE, error)
            self._kept = {}
        if in_force := self._in_force():
            told = ", ".join(f"{name} = {value}" for name, value in in_force.items())
            logger.info("Limits that were set while this host ran still hold: %s", told)

    @property
    def config(self) -> HostConfig:
        """The host's settings, with the limits that hold."""
        return replace(self._given, **self._in_force())  # type: ignore[arg-type] # each has its setting's type

    @property
    def limits(self) -> Limits:
        """The limits that hold, as numbers."""
        return Limits.of(self.config)

    def settings(self) -> dict[str, Setting]:
        """All that can be set while a host runs, as it is now and as a person writes it."""
        return {name: getattr(self.config, name) for name in CHANGEABLE}

    def changed(self, changes: object) -> dict[str, Setting]:
        """What would be kept with these `changes`, by name; a limit's default takes it away.

        Raises:
            InvalidInputError: a name or a type is wrong, or the command sets that limit.
        """
        if not isinstance(changes, dict):
            raise InvalidInputError("limits", "must be an object of limits by name")
        for name in self.fixed & changes.keys():
            problem = "is set by the host's command or its file of --config, which win: start the host without it"
            raise InvalidInputError(name, problem)
        return self._kept | {str(name): _checked(str(name), value) for name, value in changes.items()}

    def limits_with(self, kept: Mapping[str, Setting]) -> Limits:
        """The limits that would hold if these were kept; raises ConfigError for one that cannot be."""
        return Limits.of(replace(self._given, **self._in_force(kept)))  # type: ignore[arg-type] # as in `config`

    def keep(self, kept: Mapping[str, Setting]) -> None:
        """Have these hold from now on. Raises UnavailableError if they cannot be written; all is as it was then."""
        told = {name: value for name, value in kept.items() if value != CHANGEABLE[name]}
        try:
            write_atomically(self._given.state / LIMITS_FILE, f"{json.dumps(told, indent=1)}\n".encode(), mode=0o600)
        except OSError as error:
            raise UnavailableError(
                f"{self._given.state / LIMITS_FILE}: cannot be written, so the limits stay as they are: "
                f"{error.strerror}"
            ) from None
        self._kept = told

    def _in_force(self, kept: Mapping[str, Setting] | None = None) -> dict[str, Setting]:
        kept = self._kept if kept is None else kept
        return {name: value for name, value in kept.items() if name not in self.fixed}


def _read(folder: Path) -> dict[str, Setting]:
    """What is kept in a host's folder; nothing, with a warning, if that is damaged."""
    path = folder / LIMITS_FILE
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(MAX_FILE_BYTES))
        if not isinstance(told, dict):
            raise InvalidInputError("limits", "must be an object of limits by name")  # noqa: TRY301 - told like the others
        return {name: _checked(name, value) for name, value in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, InvalidInputError) as error:
        logger.warning("%s: cannot be read, so it sets no limit: %s", path, error)
        return {}


def _checked(name: str, value: object) -> Setting:
    """`value` in the type of its setting; raises InvalidInputError."""
    if name not in CHANGEABLE:
        raise InvalidInputError(name[:40], f"is no limit that can change; these can: {', '.join(CHANGEABLE)}")
    wanted = type(CHANGEABLE[name])
    if wanted is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not wanted:
        raise InvalidInputError(name, f"must be {_TYPES[wanted]}")
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        raise InvalidInputError(name, f"must have {MAX_TEXT_CHARS} characters at most, has {len(value)}")
    return value.strip() if isinstance(value, str) else value
