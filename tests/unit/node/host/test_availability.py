"""When a host works: the owner's word, hours of the day, a machine that others need, a machine that slept."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from common.clock import clock_with_sleep
from common.errors import ConfigError, DrainingError
from dht.record_versions import TTL_S
from node.host.availability import Availability, Reason
from node.host.availability_monitor import AvailabilityMonitor
from node.host.idle import BUSY_SAMPLES, IDLE_FOR_S, INPUT_S, IdleJudge, MachineUse, Sample
from node.host.signals import SIGNALS, signals_heard
from node.limits.limits import Limits
from node.limits.process_usage import ProcessUse
from node.limits.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET, BUSY = Sample(0.05, None), Sample(0.9, None)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


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


def test_a_host_works_only_while_no_reason_is_against_it() -> None:
    availability = Availability()
    assert (availability.working.is_set(), availability.pausing.is_set(), availability.reasons) == (True, False, ())
    availability.tell(Reason.OWNER, holds=True)
    availability.tell(Reason.SCHEDULE, holds=True)
    availability.tell(Reason.OWNER, holds=False)
    assert (availability.working.is_set(), availability.pausing.is_set()) == (False, True)
    assert availability.reasons == ("it is outside its schedule",)
    availability.tell(Reason.SCHEDULE, holds=False)
    assert (availability.working.is_set(), availability.pausing.is_set()) == (True, False)


def test_calls_are_refused_once_the_blocks_are_given_up_and_not_before() -> None:
    availability = Availability()
    availability.tell(Reason.OWNER, holds=True)
    assert availability.refusal() is None
    availability.away = True
    assert isinstance(availability.refusal(), DrainingError)


def test_after_a_sleep_nothing_is_answered_before_the_blocks_are_new() -> None:
    clock = FakeClock()
    availability = Availability(clock)
    clock.now_s += TTL_S - 1
    assert availability.refusal() is None
    clock.now_s += TTL_S + 1
    assert isinstance(availability.refusal(), DrainingError)
    assert availability.reasons == ("the machine slept",)
    assert availability.refusal() is not None, "also at the second look"


def test_a_host_that_holds_nothing_has_nothing_old_after_a_sleep() -> None:
    clock = FakeClock()
    availability = Availability(clock)
    availability.holding = False
    clock.now_s += 10 * TTL_S
    availability.look()
    assert not availability.has_slept


def test_the_clock_that_sees_a_sleep_goes_on() -> None:
    before_s = clock_with_sleep()
    assert clock_with_sleep() >= before_s


def heard(*samples: Sample, every_s: float = 5.0) -> list[bool]:
    judge, now_s, answers = IdleJudge(0.0), 0.0, []
    for sample in samples:
        now_s += every_s
        answers.append(judge.hear(sample, now_s))
    return answers


def test_work_begins_when_nobody_has_needed_the_machine_for_a_minute() -> None:
    answers = heard(*[QUIET] * 13)
    assert answers == [True] * (int(IDLE_FOR_S / 5) - 1) + [False] * 2


def test_one_busy_sample_is_passed_over_and_more_are_not() -> None:
    quiet = [QUIET] * 12
    assert heard(*quiet, BUSY, QUIET)[-2:] == [False, False]
    assert heard(*quiet, *[BUSY] * BUSY_SAMPLES)[-1]
    assert heard(*quiet, *[BUSY] * BUSY_SAMPLES, *[QUIET] * 11)[-1], "and work does not begin at once again"


def test_a_person_who_types_needs_the_machine() -> None:
    quiet = [QUIET] * 12
    assert heard(*quiet, Sample(0.0, INPUT_S - 1))[-1]
    assert not heard(*quiet, Sample(0.0, INPUT_S + 1))[-1]


def test_what_this_process_takes_is_not_others_use() -> None:
    use = ProcessUse()
    machine = MachineUse(use)
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    own = MachineUse(use)._read()
    assert own[1] > machine._before[1]
    assert 0.0 <= machine.sample().others <= 1.5


def test_hours_and_an_idle_machine_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    hour, clock = [12], FakeClock()
    availability, limits = Availability(), Limits(schedule=Schedule.parse("22:00-07:00"), only_when_idle=True)
    watch = AvailabilityMonitor(availability, limits, ProcessUse(), lambda: at(hour[0]), clock)
    monkeypatch.setattr(watch._machine, "sample", lambda: QUIET)
    assert set(availability.reasons) == {"it is outside its schedule", "somebody else needs the machine"}
    hour[0] = 23
    clock.now_s += IDLE_FOR_S - 1
    watch.look()
    assert availability.reasons == ("somebody else needs the machine",)
    clock.now_s += IDLE_FOR_S
    watch.look()
    assert availability.working.is_set()


def test_without_conditions_only_a_sleep_is_looked_for() -> None:
    availability = Availability()
    AvailabilityMonitor(availability, Limits(), ProcessUse()).look()
    assert availability.working.is_set()


async def test_signals_pause_resume_and_leave() -> None:
    availability, told, steps = Availability(), list[str](), list[tuple[str, ...]]()
    with signals_heard(availability, told.append):
        for word in ("pause", "resume", "leave"):
            os.kill(os.getpid(), SIGNALS[word])
            await until(lambda word=word: word in told)  # type: ignore[misc]
            steps.append(availability.reasons)
    assert steps == [("its owner paused it",), (), ()]
    assert availability.leave.is_set()
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in SIGNALS.values())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a signal sets no event
            await asyncio.sleep(0.001)
