"""How many calls about receipts a node answers."""

from __future__ import annotations

import pytest

from common.errors import OverloadedError
from node.credit import call_quota
from node.credit.call_quota import MAX_AT_ONCE, MAX_CALLS, WINDOW_S, CallQuota


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def call(quota: CallQuota, caller: str) -> None:
    with quota.one_call(caller):
        pass


def test_a_caller_has_so_many_calls_a_minute_and_others_have_theirs() -> None:
    clock = Clock()
    quota = CallQuota(clock)
    for _ in range(MAX_CALLS):
        call(quota, "greedy")
    clock.now_s += 20
    with pytest.raises(OverloadedError, match="more than 120 calls of one caller in 60 s") as refused:
        call(quota, "greedy")
    assert refused.value.retry_after_s == WINDOW_S - 20
    call(quota, "other")
    clock.now_s += WINDOW_S - 20
    call(quota, "greedy")


def test_a_few_are_answered_at_once_and_one_that_fails_makes_room() -> None:
    quota = CallQuota()
    running = [quota.one_call(str(i)) for i in range(MAX_AT_ONCE)]
    for one in running:
        one.__enter__()
    with pytest.raises(OverloadedError, match="already answers 4 calls"):
        call(quota, "one more")
    running[0].__exit__(None, None, None)
    call(quota, "one more")
    for one in running[1:]:
        one.__exit__(None, None, None)


def test_no_number_of_callers_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_quota, "MAX_CALLERS", 3)
    quota = CallQuota()
    for i in range(10):
        call(quota, str(i))
    assert len(quota._windows) == 3
