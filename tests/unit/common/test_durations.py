"""Lengths of time as people write them."""

from __future__ import annotations

import pytest

from common.durations import parse_duration
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1800),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1D12H", 129_600),
        (" 1d1h1m1s ", 90_061),
        ("90m", 5400),
    ],
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: int) -> None:
    assert parse_duration("pause", text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "1h 30m", "30m1h", "-1h", "1.5h", "0s", "1w", "1e9s", "9999999s"])
def test_a_duration_that_is_none_names_what_it_is_of_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^pause: is '.*', must be such as 30m, 2h or 1h30m$"):
        parse_duration("pause", text)
