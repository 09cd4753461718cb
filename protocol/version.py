"""What this node runs and speaks, as peers see it."""

from __future__ import annotations

import re

VERSION = "0.1.0"
PROTOCOL_VERSION = 4
"""The version of calls and records; nodes of different versions do not join each other's runs."""

SOFTWARE = f"kilohive/{VERSION}"

HOW_TO_UPDATE = "install the version that the run's owner names"
_NUMBERS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}", re.ASCII)


def is_version(text: str) -> bool:
    """Whether `text` is one to four numbers with dots between them."""
    return _NUMBERS.fullmatch(text) is not None


def is_older(version: str, than: str) -> bool:
    """Whether `version` comes before `than`; both are versions. What is left out counts as 0."""
    return _padded(version) < _padded(than)


def _padded(version: str) -> list[int]:
    numbers = [int(number) for number in version.split(".")]
    return numbers + [0] * (4 - len(numbers))
