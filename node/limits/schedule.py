"""At which times of the day a host works: `22:00-07:00`, or several such spans, by the machine's own clock."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    import time

MINUTES = 24 * 60
_SPAN = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])-([01]?[0-9]|2[0-4]):([0-5][0-9])")


@dataclass(frozen=True)
class Schedule:
    """Spans of minutes since midnight, the end not included; one that ends before it begins goes past midnight."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Raises ConfigError naming the part that is wrong."""
        return cls(tuple(_span(part.strip()) for part in text.split(",")))

    def allows(self, now: time.struct_time) -> bool:
        """Whether this local time is in one of the spans."""
        minute = now.tm_hour * 60 + now.tm_min
        return any((minute - begin) % MINUTES < (end - begin) % MINUTES for begin, end in self.spans)

    def __str__(self) -> str:
        return ",".join(f"{_clock(begin)}-{_clock(end)}" for begin, end in self.spans)


def _span(text: str) -> tuple[int, int]:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ConfigError(f"--schedule: {text[:40]!r} is no span of a day, such as 22:00-07:00")
    begin, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
    if end > MINUTES or begin == end % MINUTES:
        raise ConfigError(f"--schedule: {text[:40]!r} must end at another time than it begins, by 24:00")
    return begin, end % MINUTES


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
