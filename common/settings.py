"""What a field of a configuration can be marked with, and checks on what a person set, before anything is started."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
C = TypeVar("C")

FILE_ONLY = get_args(tyro.conf.Fixed[str])[1]
HIDDEN = "hidden"

FileOnly = Annotated[T, FILE_ONLY]
"""Type of a setting that only the file of `--config` has: no flag is offered for it."""
Hidden = Annotated[T, HIDDEN]
"""Type of a setting whose flag is accepted but shown in no help page."""


class Preset:
    """A configuration in which some settings change what the others are unless they are given."""

    def preset(self) -> Mapping[str, object]:
        """What settings that are not given are instead of their defaults, by name, going by those of this one."""
        return {}


def configured(cls: type[C], settings: Mapping[str, Any]) -> C:
    """The configuration with these settings; all others are as its preset says, or else at their defaults."""
    return cls(**{**preset_of(cls(**settings)), **settings})


def preset_of(config: object) -> Mapping[str, object]:
    """The preset of a configuration, empty for one that has none."""
    return config.preset() if isinstance(config, Preset) else {}


def is_file_only(hint: Any) -> bool:  # noqa: ANN401 - a type's annotation can be anything
    """Whether a field with this annotation has no flag."""
    return FILE_ONLY in getattr(hint, "__metadata__", ())


def is_hidden(hint: Any) -> bool:  # noqa: ANN401 - see above
    """Whether a field with this annotation has a flag that no help page shows."""
    return HIDDEN in getattr(hint, "__metadata__", ())


def flag_of(name: str) -> str:
    """The flag of a field that has one."""
    return f"--{name.replace('_', '-')}"


def shown_name(cls: type, name: str) -> str:
    """How a person knows a field of `cls`: by its flag or, if only the file has it, by its own name."""
    return name if is_file_only(get_type_hints(cls, include_extras=True).get(name)) else flag_of(name)


def check_minimums(config: object, minimums: Mapping[str, float]) -> None:
    """Raise ConfigError for the first field of `config` that is below its minimum, or not finite."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if not math.isfinite(value) or value < minimum:
            raise ConfigError(f"{shown_name(type(config), name)}: must be {minimum:g} or more, is {value:g}")
