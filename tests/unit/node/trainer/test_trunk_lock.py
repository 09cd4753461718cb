"""Steps and short calls take turns: never at once, and neither starves the other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from common.errors import DrainingError
from node.trainer.trunk_lock import TrunkLock

if TYPE_CHECKING:
    from collections.abc import Iterator

HANG_S = 20.0
"""Only for a test that fails: nothing here waits that long."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def trunk_lock(pool: ThreadPoolExecutor) -> Iterator[TrunkLock]:
    trunk_lock = TrunkLock(pool)
    yield trunk_lock
    trunk_lock.close()


def test_a_call_runs_at_once_when_no_turn_is_taken_and_never_in_the_callers_thread(trunk_lock: TrunkLock) -> None:
    assert trunk_lock.call(threading.current_thread).result(HANG_S) is not threading.current_thread()


def test_a_call_during_a_turn_runs_at_its_end_before_the_next_turn(trunk_lock: TrunkLock) -> None:
    order: list[str] = []
    with trunk_lock.turn():
        futures = [trunk_lock.call(lambda: order.append("call")) for _ in range(3)]
        order.append("first turn")
    with trunk_lock.turn():
        order.append("second turn")
    assert order == ["first turn", "call", "call", "call", "second turn"]
    assert all(future.done() for future in futures)


def test_a_turn_that_fails_still_runs_the_calls_that_waited(trunk_lock: TrunkLock) -> None:
    waiting: list[Future[str]] = []

    def fail() -> None:
        with trunk_lock.turn():
            waiting.append(trunk_lock.call(lambda: "ran"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert waiting[0].result(HANG_S) == "ran"


def test_a_calls_error_belongs_to_its_caller(trunk_lock: TrunkLock) -> None:
    with trunk_lock.turn():
        failing, fine = trunk_lock.call(lambda: 1 // 0), trunk_lock.call(lambda: 2)
    with pytest.raises(ZeroDivisionError):
        failing.result(HANG_S)
    assert fine.result(HANG_S) == 2


def test_a_cancelled_call_does_not_run(trunk_lock: TrunkLock) -> None:
    ran: list[int] = []
    with trunk_lock.turn():
        future = trunk_lock.call(lambda: ran.append(1))
        assert future.cancel()
    assert trunk_lock.call(lambda: ran).result(HANG_S) == []


def test_turns_and_calls_of_many_threads_never_overlap_and_all_end(trunk_lock: TrunkLock) -> None:
    inside = 0
    most = 0
    n_trunk_lock, n_calls = 400, 100

    def work() -> None:
        nonlocal inside, most
        inside += 1
        time.sleep(0)  # lets another thread in, if anything does
        most = max(most, inside)
        inside -= 1

    def train() -> None:
        for _ in range(n_trunk_lock):
            with trunk_lock.turn():
                work()

    def average() -> int:
        return len([trunk_lock.call(work).result(HANG_S) for _ in range(n_calls)])

    with ThreadPoolExecutor(4) as threads:
        training = [threads.submit(train) for _ in range(2)]
        calling = [threads.submit(average) for _ in range(2)]
        assert [future.result(HANG_S) for future in calling] == [n_calls, n_calls]
        for future in training:
            future.result(HANG_S)
    assert most == 1


def test_a_training_that_never_pauses_does_not_starve_calls(trunk_lock: TrunkLock) -> None:
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            with trunk_lock.turn():
                pass

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert [trunk_lock.call(partial(int, n)).result(HANG_S) for n in range(50)] == list(range(50))
    finally:
        stop.set()
        thread.join()


def test_calls_that_never_pause_do_not_hold_a_turn_up(trunk_lock: TrunkLock) -> None:
    stop, begun = threading.Event(), threading.Event()

    def again() -> None:
        begun.set()
        if not stop.is_set():
            trunk_lock.call(again)

    trunk_lock.call(again)
    assert begun.wait(HANG_S)
    for _ in range(50):
        with trunk_lock.turn():
            assert not stop.is_set()
    stop.set()


def test_after_the_end_waiting_calls_fail_and_new_ones_are_refused() -> None:
    pool = ThreadPoolExecutor(1)
    trunk_lock = TrunkLock(pool)
    pool.shutdown()
    waiting = trunk_lock.call(lambda: None)
    trunk_lock.close()
    with pytest.raises(DrainingError, match="leaving"):
        waiting.result(HANG_S)
    with pytest.raises(DrainingError, match="leaving"):
        trunk_lock.call(lambda: None)
    with pytest.raises(DrainingError, match="leaving"):
        trunk_lock.look(lambda: None)


def test_a_look_does_not_wait_for_the_end_of_a_turn(trunk_lock: TrunkLock) -> None:
    with trunk_lock.turn():
        assert trunk_lock.look(lambda: "seen").result(HANG_S) == "seen"


def test_a_look_waits_for_what_a_turn_changes(trunk_lock: TrunkLock) -> None:
    parts: list[str] = []
    with trunk_lock.turn(), trunk_lock.changing():
        parts.append("half")
        look = trunk_lock.look(lambda: list(parts))
        with pytest.raises(TimeoutError):
            look.result(0.05)
        parts.append("whole")
    assert look.result(HANG_S) == ["half", "whole"]


def test_a_look_waits_for_what_a_call_changes(trunk_lock: TrunkLock) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def change() -> str:
        begun.set()
        assert go_on.wait(HANG_S)
        return "changed"

    call = trunk_lock.call(change)
    assert begun.wait(HANG_S)
    look = trunk_lock.look(call.done)
    assert not look.done()
    go_on.set()
    assert look.result(HANG_S) is True


def test_calls_that_wait_run_before_a_turn_changes_anything(trunk_lock: TrunkLock) -> None:
    order: list[str] = []
    with trunk_lock.turn():
        trunk_lock.call(lambda: order.append("call"))
        order.append("computed")
        with trunk_lock.changing():
            order.append("changed")
    assert order == ["computed", "call", "changed"]


def test_looks_that_were_asked_for_are_answered_before_the_end(trunk_lock: TrunkLock) -> None:
    looks = [trunk_lock.look(partial(int, n)) for n in range(20)]
    trunk_lock.close()
    assert [look.result(0) for look in looks] == list(range(20))
