"""Limits that an owner sets while the host runs: kept, checked, and never over those of the command."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import ConfigError, InvalidInputError, UnavailableError
from node.host.config import HostConfig
from node.host.owner_limits import CHANGEABLE, LIMITS_FILE, OwnerLimits

if TYPE_CHECKING:
    from pathlib import Path


def started(folder: Path, **flags: Any) -> OwnerLimits:
    return OwnerLimits(HostConfig(state=folder, **flags))


def change(limits: OwnerLimits, **changes: Any) -> None:
    limits.keep(limits.changed(changes))


def test_what_is_set_holds_at_once_and_after_a_restart(tmp_path: Path) -> None:
    limits = started(tmp_path)
    change(limits, max_bandwidth_up="2MB/s", max_cpu_percent=50, schedule="22:00-07:00", only_when_idle=True)
    for now in (limits, started(tmp_path)):
        assert (now.limits.up_bytes_per_s, now.limits.cpu_percent) == (2_000_000, 50.0)
        assert str(now.limits.schedule) == "22:00-07:00"
        assert now.config.only_when_idle
        assert now.settings().keys() == CHANGEABLE.keys()
    assert stat.S_IMODE((tmp_path / LIMITS_FILE).stat().st_mode) == 0o600


def test_the_value_that_sets_no_limit_takes_one_away_and_is_not_kept(tmp_path: Path) -> None:
    limits = started(tmp_path)
    change(limits, max_memory="2GB", max_bandwidth_up="2MB/s")
    change(limits, max_memory="")
    assert limits.limits.memory_bytes is None
    assert json.loads((tmp_path / LIMITS_FILE).read_text()) == {"max_bandwidth_up": "2MB/s"}


def test_the_commands_limit_wins_and_the_owners_comes_back_without_it(tmp_path: Path) -> None:
    change(started(tmp_path), max_memory="2GB", max_cpu_percent=50.0)
    with_flag = started(tmp_path, max_memory="1GB")
    assert with_flag.limits.memory_bytes == 1_000_000_000
    assert with_flag.fixed == {"max_memory"}
    with pytest.raises(InvalidInputError, match="max_memory: is set by the host's command"):
        with_flag.changed({"max_memory": "3GB"})
    change(with_flag, max_cpu_percent=60.0)
    assert started(tmp_path).limits.memory_bytes == 2_000_000_000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([], "limits: must be an object of limits by name"),
        ({"max_disk": "2GB"}, "max_disk: is no limit that can change; these can: max_memory, "),
        ({"x" * 500: 1}, f"{'x' * 40}: is no limit"),
        ({"max_memory": 5}, "max_memory: must be a text"),
        ({"max_memory": "x" * 201}, "max_memory: must have 200 characters at most, has 201"),
        ({"max_cpu_percent": True}, "max_cpu_percent: must be a number"),
        ({"max_cpu_percent": 1 << 4000}, "max_cpu_percent: must be a number"),
        ({"only_when_idle": 1}, "only_when_idle: must be true or false"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_name(tmp_path: Path, changes: object, problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        started(tmp_path).changed(changes)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize("value", ["lots", "100KB/s"])
def test_a_limit_that_cannot_be_kept_names_the_flag(tmp_path: Path, value: str) -> None:
    limits = started(tmp_path)
    with pytest.raises(ConfigError, match="--max-bandwidth-up: is"):
        limits.limits_with(limits.changed({"max_bandwidth_up": value}))
    assert limits.limits.up_bytes_per_s is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"max_memory": 5}', '{"max_memory": "lots"}', '{"max_disc": "1GB"}', "\xff"]
)
def test_a_damaged_file_sets_no_limit_and_says_so(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LIMITS_FILE).write_text(content, encoding="latin-1")
    assert started(tmp_path).limits == started(tmp_path / "empty").limits
    assert f"{tmp_path / LIMITS_FILE}: " in caplog.text
    assert "so it sets no limit" in caplog.text


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-memory: is 'lots'"):
        started(tmp_path, max_memory="lots")


def test_a_disk_that_takes_nothing_leaves_the_limits_as_they_are(tmp_path: Path) -> None:
    (tmp_path / LIMITS_FILE).mkdir()
    limits = started(tmp_path)
    with pytest.raises(UnavailableError, match="cannot be written, so the limits stay as they are"):
        change(limits, max_memory="2GB")
    assert limits.limits.memory_bytes is None
