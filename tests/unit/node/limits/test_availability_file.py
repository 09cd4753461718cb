"""The file in which a host says why it does not work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from node.limits.availability_file import AVAILABILITY_FILE, read_availability, write_availability
from node.limits.events import AvailabilityEvent, HeldReason

if TYPE_CHECKING:
    from pathlib import Path

OWNER = HeldReason(name="owner", why="its owner paused it", since_s=1000.0, until_s=4600.0)
STEAM = HeldReason(name="program", why="steam runs", since_s=1200.5, until_s=None)


@pytest.mark.parametrize("reasons", [(), (OWNER,), (OWNER, STEAM)])
def test_what_a_host_wrote_is_what_is_read(reasons: tuple[HeldReason, ...], tmp_path: Path) -> None:
    event = AvailabilityEvent(reasons=reasons, unknown=("whether anybody is there is not known",))
    write_availability(tmp_path, event)
    assert read_availability(tmp_path) == event


def test_a_folder_without_it_says_nothing(tmp_path: Path) -> None:
    assert read_availability(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"event": "load"}', '{"event": "availability", "reasons": [1]}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / AVAILABILITY_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"availability\.json: (cannot be read|does not say)"):
        read_availability(tmp_path)
