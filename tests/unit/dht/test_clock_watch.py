"""A clock that is set while a node runs, and one that is wrong when it joins."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from common.clock import SteadyClock
from common.errors import UnavailableError
from dht.clock_watch import SAY_SYSTEM_S, ClockWatch, check_clock

START_S = 1_800_000_000.0


class Machine:
    """A machine whose clock is set by `step_s`; `peers` are how far its peers' clocks are ahead of its system's."""

    def __init__(self) -> None:
        self.elapsed_s, self.step_s = 50.0, 0.0
        self.right: float | None = 0.0
        self.clock = SteadyClock(self.system, lambda: self.elapsed_s)
        self.watch = ClockWatch(self.clock, self._ask, sleep=self._sleep)

    def system(self) -> float:
        return START_S + self.elapsed_s + self.step_s

    @property
    def true_s(self) -> float:
        return START_S + self.elapsed_s

    async def _ask(self) -> list[float] | None:
        return (
            None if self.right is None else [self.true_s + self.right - self.clock() + noise for noise in (-0.5, 0, 2)]
        )

    async def _sleep(self, seconds: float) -> None:
        self.elapsed_s += seconds


@pytest.mark.parametrize("step_s", [-30.0, 30.0, -86_400.0, 7.0])
async def test_a_step_that_peers_do_not_share_is_ignored(step_s: float, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.step_s = step_s
    for _ in range(3):
        await machine.watch.look()
    assert machine.clock() == pytest.approx(machine.true_s)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    which = "forward" if step_s > 0 else "back"
    assert f"The system clock was set {which} by {abs(step_s):.0f} s while this node ran" in caplog.text
    assert "set the clock right" in caplog.text


@pytest.mark.parametrize("step_s", [-30.0, 30.0])
async def test_a_step_to_the_time_of_the_peers_is_taken(step_s: float, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.step_s = machine.right = step_s
    for _ in range(3):
        await machine.watch.look()
    assert machine.clock() == pytest.approx(machine.system())
    assert caplog.text.count("takes the new time") == 1


async def test_without_peers_the_new_time_is_taken() -> None:
    machine = Machine()
    machine.step_s, machine.right = 30.0, None
    await machine.watch.look()
    assert machine.clock() == pytest.approx(machine.system())


async def test_back_to_where_it_was_is_a_step_too(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    for machine.step_s in (30.0, 0.0):
        await machine.watch.look()
    assert machine.clock() == pytest.approx(machine.true_s)
    assert len(caplog.records) == 2


async def test_after_a_step_peers_are_told_the_systems_time_for_a_while() -> None:
    machine = Machine()
    machine.step_s = 30.0
    await machine.watch.look()
    assert machine.clock.told() == machine.system()
    machine.elapsed_s += SAY_SYSTEM_S
    assert machine.clock.told() == machine.clock()


async def test_small_corrections_are_none(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    for machine.step_s in (0.4, 0.8, 1.2):
        await machine.watch.look()
    assert not caplog.records


def test_a_wrong_clock_is_named_with_seconds_and_direction() -> None:
    check_clock([])
    check_clock([2.5, -1.0])
    with pytest.raises(UnavailableError, match=r"^clock: this machine's clock is 5\.0 s behind that of the peer"):
        check_clock([5.0])
    with pytest.raises(UnavailableError, match=r"is 86400\.0 s ahead of those of the 3 peers"):
        check_clock([-86_400.0, -86_400.0, 0.0])


def test_time_goes_on_while_the_clock_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = SteadyClock()
    before_s = clock()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert before_s <= clock() < before_s + 60.0
