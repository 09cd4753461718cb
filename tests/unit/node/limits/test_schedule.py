"""Hours of the day at which a host works."""

from __future__ import annotations

import time

import pytest

from common.errors import ConfigError
from node.limits.schedule import Schedule


def at(hour: int, minute: int = 0) -> time.struct_time:
    return time.struct_time((2026, 11, 25, hour, minute, 0, 2, 329, 0))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-07:00", [(22, 0), (23, 59), (0, 0), (6, 59)], [(7, 0), (12, 0), (21, 59)]),
        ("9:30-17:00", [(9, 30), (16, 59)], [(9, 29), (17, 0), (0, 0)]),
        ("18:00-24:00", [(18, 0), (23, 59)], [(0, 0), (17, 59)]),
        ("22:00-07:00, 12:00-13:00", [(12, 30), (3, 0)], [(13, 0), (9, 0)]),
    ],
)
def test_a_schedule_allows_the_minutes_of_its_spans(
    text: str, inside: list[tuple[int, int]], outside: list[tuple[int, int]]
) -> None:
    schedule = Schedule.parse(text)
    assert all(schedule.allows(at(*moment)) for moment in inside)
    assert not any(schedule.allows(at(*moment)) for moment in outside)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "22:00", "25:00-07:00", "22:00-24:30", "08:00-08:00", "00:00-24:00", "22-7"])
def test_a_schedule_that_is_none_names_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--schedule: "):
        Schedule.parse(text)
