"""What a host has room for."""

from __future__ import annotations

import pytest

from node.host.capacity import EVENTS_SHARE, events_bytes
from node.host.config import HostConfig
from node.limits.limits import Limits


@pytest.mark.parametrize("event_log_mb", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("event_log_files", [1, 2, 5])
def test_all_files_of_the_event_log_keep_to_their_share_of_the_disk(event_log_mb: float, event_log_files: int) -> None:
    config = HostConfig(event_log_mb=event_log_mb, event_log_files=event_log_files)
    limits = Limits(disk_bytes=50_000_000)
    assert 0 < events_bytes(config, limits) * event_log_files <= 50_000_000 * EVENTS_SHARE


def test_without_a_limit_of_the_disk_the_setting_holds() -> None:
    assert events_bytes(HostConfig(event_log_mb=2.5), Limits()) == 2_500_000
    assert events_bytes(HostConfig(event_log_mb=2.5), Limits(disk_bytes=10**12)) == 2_500_000
