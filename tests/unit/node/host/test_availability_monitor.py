"""Conditions are looked at one beside the other: what they find, how long that counts, and one that hangs."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from common.clock import clock_with_sleep
from dht.record_versions import TTL_S
from node.host import availability_monitor
from node.host.availability import Availability, Reason
from node.host.availability_monitor import AvailabilityMonitor
from node.host.conditions import Condition
from node.limits.finding import Finding
from tests.support.local_swarm import until

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

PLAYS = Finding("steam runs")
NOTHING = Finding()
UNKNOWN = Finding(unknown="whether this machine runs on its battery is not known: it counts as on mains")
SETTLE_S = 10.0


class Scene:
    """A condition that finds what the test says, at a time that the test says."""

    def __init__(self, **changes: Any) -> None:
        self.now_s, self.finding, self.threads = 1000.0, NOTHING, list[threading.Thread]()
        self.availability = Availability()
        self.condition = Condition(reason=Reason.PROGRAM, look=self._look, **changes)
        self.monitor = AvailabilityMonitor(self.availability, [self.condition], lambda: self.now_s)

    def _look(self) -> Finding:
        self.threads.append(threading.current_thread())
        return self.finding

    async def finds(self, finding: Finding, after_s: float = 0.0) -> bool:
        """Whether the host works then."""
        self.finding, self.now_s = finding, self.now_s + after_s
        await self.monitor.look()
        return self.availability.working.is_set()


async def test_what_a_condition_finds_keeps_the_host_from_working_until_it_finds_nothing() -> None:
    scene = Scene()
    assert await scene.finds(NOTHING)
    assert not await scene.finds(PLAYS, after_s=5)
    assert scene.availability.reasons == ("steam runs",)
    assert await scene.finds(NOTHING, after_s=5)


async def test_work_begins_again_only_when_nothing_was_found_for_a_while() -> None:
    scene = Scene(settle_s=SETTLE_S)
    assert await scene.finds(NOTHING), "before anything was found nothing has to settle"
    assert not await scene.finds(PLAYS, after_s=5)
    assert not await scene.finds(NOTHING, after_s=SETTLE_S - 1)
    assert not await scene.finds(PLAYS, after_s=1), "a program that starts itself anew"
    assert not await scene.finds(NOTHING, after_s=SETTLE_S - 1)
    assert scene.availability.reasons == ("steam runs",)
    assert await scene.finds(NOTHING, after_s=1)


async def test_what_cannot_be_known_counts_as_nothing_against_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene()
    for finding in (UNKNOWN, UNKNOWN, NOTHING, UNKNOWN):
        assert await scene.finds(finding, after_s=5)
        assert scene.availability.unknown == ((finding.unknown,) if finding.unknown else ())
    assert caplog.text.count("On this machine, whether this machine runs on its battery is not known") == 1


async def test_the_moment_at_which_a_reason_ends_comes_along() -> None:
    scene = Scene(until_s=lambda: 4600.0)
    await scene.finds(PLAYS)
    assert scene.availability.until_s == 4600.0


async def test_a_look_that_may_block_has_a_thread_of_its_own_and_no_other_has() -> None:
    blocks, quick = Scene(), Scene(blocks=False)
    await blocks.finds(PLAYS)
    await quick.finds(PLAYS)
    assert blocks.threads[0].name == "look at program"
    assert quick.threads == [threading.current_thread()]


async def test_a_look_that_hangs_is_not_known_is_not_begun_twice_and_keeps_no_other_from_being_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(availability_monitor, "TIMEOUT_S", 0.05)
    go_on, looks = threading.Event(), list[int]()

    def hang() -> Finding:
        looks.append(1)
        go_on.wait(20)
        return Finding("another program uses the GPU")

    availability = Availability()
    hanging = Condition(reason=Reason.GPU, look=hang)
    other = Condition(reason=Reason.PROGRAM, look=lambda: PLAYS)
    monitor = AvailabilityMonitor(availability, [hanging, other])
    try:
        await monitor.look()
        await monitor.look()
        assert availability.reasons == ("steam runs",)
        assert list(availability.unknown) == ["the look at gpu takes longer than 0.05 s: it counts as nothing against"]
        assert len(looks) == 1
    finally:
        go_on.set()
    monkeypatch.setattr(availability_monitor, "TIMEOUT_S", 20.0)
    await eventually(monitor.look, lambda: len(availability.reasons) == 2)
    assert not availability.unknown


async def test_each_condition_is_looked_at_as_often_as_it_wants() -> None:
    looks = {"often": 0, "seldom": 0}

    def count(name: str) -> Callable[[], Finding]:
        def look() -> Finding:
            looks[name] += 1
            return NOTHING

        return look

    conditions = [
        Condition(reason=Reason.OWNER, look=count("often"), every_s=0.001, blocks=False),
        Condition(reason=Reason.SCHEDULE, look=count("seldom"), every_s=1000.0, blocks=False),
    ]
    watching = asyncio.create_task(AvailabilityMonitor(Availability(), conditions).watch())
    await eventually(lambda: asyncio.sleep(0.001), lambda: looks["often"] > 3)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert looks["seldom"] == 0


async def test_a_sleep_is_noticed_without_any_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability_monitor, "SLEEP_LOOK_S", 0.001)
    slept_s = [0.0]
    availability = Availability(lambda: clock_with_sleep() + slept_s[-1])
    watching = asyncio.create_task(AvailabilityMonitor(availability, []).watch())
    slept_s.append(2 * TTL_S)
    async with asyncio.timeout(10):
        await availability.pausing.wait()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert availability.reasons == ("the machine slept",)


async def eventually(work: Callable[[], Any], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await work()


def schedule(finding: Finding) -> Condition:
    return Condition(reason=Reason.SCHEDULE, look=lambda: finding, blocks=False)


async def test_a_condition_that_is_taken_away_counts_no_longer_and_a_new_one_does() -> None:
    scene = Scene()
    await scene.finds(PLAYS)
    scene.monitor.follow([schedule(Finding("it is outside its schedule"))])
    assert scene.availability.working.is_set(), "nobody looks whether steam runs"
    await scene.monitor.look()
    assert scene.availability.reasons == ("it is outside its schedule",)
    scene.monitor.follow([schedule(NOTHING)])
    await scene.monitor.look()
    assert scene.availability.working.is_set()


async def test_what_is_unknown_of_a_condition_that_is_taken_away_is_told_no_more() -> None:
    scene = Scene()
    await scene.finds(UNKNOWN)
    scene.monitor.follow([])
    assert scene.availability.unknown == ()


async def test_a_condition_that_stays_settles_as_long_as_it_would_have() -> None:
    scene = Scene(settle_s=SETTLE_S)
    await scene.finds(PLAYS)
    scene.monitor.follow([scene.condition])
    assert not await scene.finds(NOTHING, after_s=SETTLE_S - 1)
    assert await scene.finds(NOTHING, after_s=1)


async def test_conditions_that_change_while_they_are_watched_are_watched_anew() -> None:
    scene, found = Scene(every_s=1000.0), Finding("it is outside its schedule")
    condition = Condition(reason=Reason.SCHEDULE, look=lambda: found, every_s=0.01, blocks=False)
    watching = asyncio.create_task(scene.monitor.watch())
    await asyncio.sleep(0)
    scene.monitor.follow([condition])
    await until(lambda: not scene.availability.working.is_set(), "the new condition was looked at")
    assert scene.availability.reasons == ("it is outside its schedule",)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
