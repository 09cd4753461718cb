"""Whether others need the machine: its processors, and a person at a terminal or a screen."""

from __future__ import annotations

import time

import pytest

from node.host.idle import (
    BUSY,
    BUSY_SAMPLES,
    BUSY_SHARE,
    INPUT_S,
    MIN_SAMPLE_S,
    NOT_WATCHED,
    SAMPLE_S,
    TYPING,
    Person,
    Processors,
    others_and_all_s,
)
from node.limits.finding import Finding
from node.limits.process_usage import ProcessUse
from node.limits.sessions import PERSON, NoLoginManagerError, Sessions

NOTHING = Finding()
QUIET, LOUD = BUSY_SHARE - 0.1, BUSY_SHARE + 0.1


class Machine:
    """Two processors, of whose time others take the share that a test says."""

    def __init__(self) -> None:
        self.now_s, self.others_s = 1000.0, 50.0
        self.processors = Processors(ProcessUse(), lambda _: (self.others_s, 2 * self.now_s), lambda: self.now_s)

    def look(self, share: float, after_s: float = SAMPLE_S) -> Finding:
        self.now_s += after_s
        self.others_s += share * 2 * after_s
        return self.processors.look()


def test_processors_count_as_busy_until_they_have_been_watched() -> None:
    machine = Machine()
    assert machine.look(QUIET, after_s=MIN_SAMPLE_S / 2) == NOT_WATCHED
    assert machine.look(QUIET) == NOTHING


def test_one_busy_sample_is_passed_over_and_more_are_not() -> None:
    machine = Machine()
    assert [machine.look(share) for share in (LOUD, QUIET, LOUD, QUIET)] == [NOTHING] * 4
    assert [machine.look(LOUD) for _ in range(BUSY_SAMPLES)][-1] == BUSY
    assert machine.look(QUIET) == NOTHING


def test_a_look_a_moment_after_another_says_the_same() -> None:
    machine = Machine()
    for _ in range(BUSY_SAMPLES):
        machine.look(LOUD)
    assert machine.look(QUIET, after_s=MIN_SAMPLE_S / 2) == BUSY


def test_what_this_process_takes_is_not_others_use() -> None:
    use = ProcessUse()
    before = others_and_all_s(use)
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    after = others_and_all_s(use)
    assert after[1] > before[1]
    # On all processors together others took what was left at most.
    assert after[0] - before[0] <= after[1] - before[1]


def nobody(*_: str) -> str:
    return ""


@pytest.mark.parametrize(
    ("age_s", "finding"), [(None, NOTHING), (INPUT_S + 1, NOTHING), (INPUT_S - 1, TYPING), (0.0, TYPING)]
)
def test_a_person_who_types_at_a_terminal_is_there(age_s: float | None, finding: Finding) -> None:
    assert Person(Sessions(INPUT_S, nobody), lambda: age_s).look() == finding


def test_a_person_at_a_screen_is_there_too() -> None:
    def somebody(command: str, *_: str) -> str:
        return "2 1000 ada seat0" if command == "list-sessions" else "Type=x11\nClass=user\nActive=yes\nState=active"

    assert Person(Sessions(INPUT_S, somebody), lambda: None).look() == PERSON


def test_terminals_are_seen_where_screens_are_not() -> None:
    def unknown(*_: str) -> str:
        raise NoLoginManagerError("there is no loginctl here")

    sessions = Sessions(INPUT_S, unknown)
    assert Person(sessions, lambda: 1.0).look() == TYPING
    assert "there is no loginctl here" in Person(sessions, lambda: None).look().unknown
