"""When a host works: what speaks against it and since when, a machine that slept, the owner's signals."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from common.clock import clock_with_sleep
from common.errors import DrainingError
from dht.record_versions import TTL_S
from node.host.availability import Availability, Reason
from node.host.owner_pause import OwnerPause, WantedPause, write_pause
from node.host.signals import SIGNALS, signals_heard
from node.limits.events import HeldReason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAUSED, OUTSIDE, PLAYS = "its owner paused it", "it is outside its schedule", "steam runs"


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_host_works_only_while_no_reason_is_against_it() -> None:
    availability = Availability()
    assert (availability.working.is_set(), availability.pausing.is_set(), availability.reasons) == (True, False, ())
    availability.tell(Reason.OWNER, PAUSED)
    availability.tell(Reason.SCHEDULE, OUTSIDE)
    availability.tell(Reason.OWNER, "")
    assert (availability.working.is_set(), availability.pausing.is_set()) == (False, True)
    assert availability.reasons == (OUTSIDE,)
    availability.tell(Reason.SCHEDULE, "")
    assert (availability.working.is_set(), availability.pausing.is_set()) == (True, False)


def test_a_reason_holds_since_it_was_told_first_whatever_its_words() -> None:
    now = FakeClock()
    availability = Availability(now_s=now)
    availability.tell(Reason.PROGRAM, PLAYS)
    now.now_s += 60
    availability.tell(Reason.PROGRAM, "blender and steam run")
    availability.tell(Reason.OWNER, PAUSED, until_s=5000.0)
    assert availability.held == (
        HeldReason(name="owner", why=PAUSED, since_s=1060.0, until_s=5000.0),
        HeldReason(name="program", why="blender and steam run", since_s=1000.0, until_s=None),
    )
    assert availability.since_s == 1000.0
    availability.tell(Reason.PROGRAM, "")
    now.now_s += 60
    availability.tell(Reason.PROGRAM, PLAYS)
    assert availability.held[-1].since_s == 1120.0


def test_the_end_of_a_pause_is_known_only_where_each_reason_has_one() -> None:
    availability = Availability()
    assert (availability.since_s, availability.until_s) == (0.0, None)
    availability.tell(Reason.OWNER, PAUSED, until_s=5000.0)
    assert availability.until_s == 5000.0
    availability.tell(Reason.SCHEDULE, OUTSIDE)
    assert availability.until_s is None


def test_others_are_told_no_more_than_whose_doing_a_pause_is() -> None:
    availability = Availability()
    causes = [availability.cause]
    for reason in (Reason.PROGRAM, Reason.OWNER, Reason.SLEPT, Reason.DEVICE):
        availability.tell(reason, "because")
        causes.append(availability.cause)
    assert causes == ["none", "condition", "owner", "sleep", "device"]


def test_only_what_is_new_is_worth_telling() -> None:
    availability = Availability()
    tells: list[Callable[[], None]] = [
        partial(availability.tell, Reason.PROGRAM, PLAYS),
        partial(availability.tell_unknown, Reason.PERSON, "whether anybody is there is not known"),
        partial(availability.tell, Reason.PROGRAM, ""),
        partial(availability.tell_unknown, Reason.PERSON, ""),
    ]
    for tell in tells:
        tell()
        assert availability.changed.is_set()
        availability.changed.clear()
        tell()
        assert not availability.changed.is_set()
    assert (availability.held, availability.unknown) == ((), ())


def test_calls_are_refused_once_the_blocks_are_given_up_and_not_before() -> None:
    availability = Availability()
    availability.tell(Reason.OWNER, PAUSED)
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


async def test_signals_pause_resume_and_leave(tmp_path: Path) -> None:
    availability, told, steps = Availability(), list[str](), list[tuple[HeldReason, ...]]()
    clock = FakeClock()
    with signals_heard(availability, OwnerPause(tmp_path, clock), told.append):
        for word, until_s in (("pause", None), ("pause", 4600.0), ("resume", None), ("leave", None)):
            if until_s is not None:
                write_pause(tmp_path, WantedPause(until_s=until_s))
            told.clear()
            os.kill(os.getpid(), SIGNALS[word])
            await until(lambda word=word: word in told)  # type: ignore[misc]
            steps.append(availability.held)
    assert [[(held.why, held.until_s) for held in step] for step in steps] == [
        [(PAUSED, None)],
        [(PAUSED, 4600.0)],
        [],
        [],
    ]
    assert availability.leave.is_set()
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in SIGNALS.values())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a signal sets no event
            await asyncio.sleep(0.001)
