"""Limits that change while a host works: every part follows, and what cannot be changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest

from common.errors import ConfigError, InvalidInputError
from common.events import EventLog
from node.host import placement_controller
from node.host.availability import Availability, Reason
from node.host.availability_monitor import AvailabilityMonitor
from node.host.capacity import RoomPlan, block_bytes
from node.host.conditions import conditions_of
from node.host.config import HostConfig
from node.host.live_limits import LimitedParts, LiveLimits
from node.host.memory_watch import MemoryWatch
from node.host.owner_limits import OwnerLimits
from node.host.owner_pause import OwnerPause
from node.limits.process_usage import ProcessUse
from node.limits.rate_limits import RateLimits
from tests.support.events import written_to
from tests.support.keeping import MANIFEST, keeping
from tests.support.swarm_parts import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from node.limits.limits import Limits
    from tests.support.keeping import Keeping

MB = 1_000_000
IDLE_BYTES = 100 * MB
FEW_BLOCKS = f"{(IDLE_BYTES + 40 * MB + 2 * 6 * block_bytes(MANIFEST)) // 1000 + 1}kB"
"""So much is taken with one block."""


@dataclass
class Scene:
    """A host's parts that follow its limits."""

    host: Keeping
    owner: OwnerLimits
    live: LiveLimits
    rate_limits: RateLimits
    memory: MemoryWatch
    availability: Availability
    events: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(placement_controller, "WITHDRAW_GRACE_S", 0.0)
    config, use = HostConfig(state=tmp_path, on_battery=True), ProcessUse()
    owner, availability, events = OwnerLimits(config), Availability(), EventLog()
    pause, rate_limits = OwnerPause(tmp_path), RateLimits(owner.limits, use)

    async def give_up_one(_reason: str) -> None:
        raise AssertionError

    with keeping(tmp_path / "blocks") as host:
        memory = MemoryWatch(None, use, give_up_one)
        room = RoomPlan(config, 3, MANIFEST, CPU, IDLE_BYTES)

        def conditions(limits: Limits) -> Any:
            return conditions_of(limits, pause, use, CPU)

        parts = LimitedParts(
            rate_limits=rate_limits,
            memory=memory,
            runtime=host.runtime,
            placement=host.placement,
            monitor=AvailabilityMonitor(availability, conditions(owner.limits)),
            capacity=room.under,
            conditions=conditions,
        )
        live = LiveLimits(owner, parts, room.under(owner.limits), events)
        found = Scene(host, owner, live, rate_limits, memory, availability)
        events.subscribe(written_to(cast("Any", found.events)))
        yield found


async def test_rates_memory_and_hours_follow_at_once_and_are_told(scene: Scene) -> None:
    changes = {"max_bandwidth_up": "2MB/s", "max_memory": "8GB", "schedule": "00:00-00:01,00:02-00:03"}
    await scene.live.change(changes)
    assert scene.rate_limits.slower_bytes_per_s < 2 * MB
    assert scene.memory.limit_bytes is not None
    assert scene.memory.limit_bytes <= 8_000 * MB
    (told,) = scene.events
    assert told["event"] == "limits"
    assert told["limits"]["up_bytes_per_s"] == 2 * MB
    await scene.live.change(dict.fromkeys(changes, ""))
    assert scene.availability.working.is_set()
    assert scene.rate_limits.slower_bytes_per_s == float("inf")


async def test_a_condition_is_looked_at_before_the_change_is_answered(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.limits.schedule.Schedule.allows", lambda *_: False)
    await scene.live.change({"schedule": "22:00-07:00"})
    assert [held.name for held in scene.availability.held] == [Reason.SCHEDULE]
    await scene.live.change({"schedule": ""})
    assert scene.availability.held == ()


async def test_blocks_that_no_longer_fit_are_given_up_and_more_are_held_when_they_fit_again(scene: Scene) -> None:
    await scene.host.placement.take_first()
    assert len(scene.host.runtime.blocks) == 3
    await scene.live.change({"max_memory": FEW_BLOCKS})
    assert len(scene.host.runtime.blocks) == scene.live.room.max_blocks == 1
    await scene.live.change({"max_memory": ""})
    assert scene.host.planner.max_blocks == 3


async def test_another_rate_leaves_the_blocks_alone(scene: Scene) -> None:
    await scene.host.placement.take_first()
    scene.host.planner.hold_at_most(2)  # as for want of memory
    await scene.live.change({"max_bandwidth_up": "2MB/s"})
    assert scene.host.planner.max_blocks == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_memory": "1MB", "max_bandwidth_up": "2MB/s"}, ConfigError),
        ({"max_cpu_percent": 1.0}, ConfigError),
        ({"schedule": "late"}, ConfigError),
        ({"on_battery": False}, InvalidInputError),
    ],
)
async def test_what_cannot_be_changes_nothing(scene: Scene, changes: object, error: type[Exception]) -> None:
    before = scene.owner.settings()
    with pytest.raises(error):
        await scene.live.change(changes)
    assert scene.owner.settings() == before
    assert scene.rate_limits.slower_bytes_per_s == float("inf")
    assert scene.events == []
