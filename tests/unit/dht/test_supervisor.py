"""When p2pd is started again, after which pause, and when that is given up: with a fake p2pd and a fake clock."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.errors import UnavailableError
from dht.daemon import Daemon, DaemonOutput
from dht.socket_folder import SocketFolder
from dht.supervisor import MAX_PAUSE_S, MAX_STARTS, STEADY_S, DaemonSupervisor, RestartBackoff


@dataclass
class FakeDaemon:
    """Dies when told to."""

    pid: int
    exit_code: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    stopped: bool = False

    async def ended(self) -> int:
        return await asyncio.shield(self.exit_code)

    async def stop(self) -> None:
        self.stopped = True

    def die(self) -> None:
        self.exit_code.set_result(-9)


class Machine:
    """Starts p2pd, or fails to; time passes only in pauses."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []
        self.daemons = [FakeDaemon(0)]
        self.taken_over: list[int] = []
        self.fails_to_start = self.fails_to_connect = 0
        self.supervisor = DaemonSupervisor(
            self.daemons[0],  # type: ignore[arg-type]
            start=self.start,  # type: ignore[arg-type]
            take_over=self.take_over,  # type: ignore[arg-type]
            backoff=RestartBackoff(lambda: self.now_s),
            sleep=self.sleep,
        )

    async def start(self) -> FakeDaemon:
        if self.fails_to_start:
            self.fails_to_start -= 1
            raise UnavailableError("the port is taken")
        self.daemons.append(FakeDaemon(len(self.daemons)))
        return self.daemons[-1]

    async def take_over(self, daemon: FakeDaemon) -> None:
        if self.fails_to_connect:
            self.fails_to_connect -= 1
            raise UnavailableError("it does not answer")
        self.taken_over.append(daemon.pid)

    async def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now_s += pause_s

    async def death(self) -> None:
        self.daemons[-1].die()
        await self.supervisor.restarted()


async def test_the_first_death_is_answered_at_once_and_the_old_folder_goes() -> None:
    machine = Machine()
    await machine.death()
    assert machine.pauses == [0.0]
    assert machine.supervisor.daemon is machine.daemons[1]  # type: ignore[comparison-overlap]
    assert machine.taken_over == [1]
    assert [daemon.stopped for daemon in machine.daemons] == [True, False]


async def test_nothing_happens_while_p2pd_runs() -> None:
    machine = Machine()
    waiting = asyncio.create_task(machine.supervisor.restarted())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert len(machine.daemons) == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_deaths_in_a_row_wait_longer_and_longer_up_to_a_bound_and_then_are_given_up() -> None:
    machine = Machine()
    for _ in range(MAX_STARTS):
        await machine.death()
    assert machine.pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert max(machine.pauses) == MAX_PAUSE_S
    with pytest.raises(UnavailableError, match=r"exit code -9; this was the last of 8 tries in a row, restart this"):
        await machine.death()
    assert len(machine.daemons) == 1 + MAX_STARTS


async def test_one_that_lived_long_enough_begins_a_new_row() -> None:
    machine = Machine()
    for _ in range(3):
        await machine.death()
    machine.now_s += STEADY_S
    await machine.death()
    assert machine.pauses == [0.0, 0.5, 1.0, 0.0]


async def test_a_start_that_fails_is_tried_again_and_each_try_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.fails_to_start = 2
    with caplog.at_level(logging.WARNING, "dht.supervisor"):
        await machine.death()
    assert machine.pauses == [0.0, 0.5, 1.0]
    same = "with the same identity and port"
    assert [record.getMessage() for record in caplog.records] == [
        f"p2pd has ended with exit code -9; it is started again now, {same}",
        f"p2pd cannot be started again: the port is taken; it is started again in 0.5 s, {same}",
        f"p2pd cannot be started again: the port is taken; it is started again in 1 s, {same}",
    ]


async def test_a_p2pd_that_starts_and_does_not_answer_is_stopped_before_the_next() -> None:
    machine = Machine()
    machine.fails_to_connect = 1
    await machine.death()
    assert [daemon.stopped for daemon in machine.daemons] == [True, True, False]
    assert machine.taken_over == [2]


async def test_a_p2pd_that_never_starts_again_is_one_sentence_that_says_why() -> None:
    machine = Machine()
    machine.fails_to_start = MAX_STARTS
    with pytest.raises(UnavailableError, match="cannot be started again: the port is taken; this was the last of 8"):
        await machine.death()
    assert sum(machine.pauses) < 60.0


class EndingProcess:
    """A process that ends when the test says so."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def terminate(self) -> None:
        pass

    async def wait(self) -> int:
        return await self.ended


async def test_a_stop_that_is_cancelled_just_as_the_process_ends_is_cancelled() -> None:
    process: Any = EndingProcess()
    stopping = asyncio.create_task(Daemon(process, SocketFolder(), DaemonOutput()).stop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    process.ended.set_result(-9)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
