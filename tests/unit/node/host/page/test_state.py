"""What the page says of a host in one sentence, and how fast it takes what it takes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from common.text import moment_text
from node.host.page.state import WINDOW_S, RateWindow, page_state, sentence, silent_state
from tests.support.told_host import CREDIT, told

PAUSED = [{"name": "owner", "why": "its owner paused it", "since_s": 1.0, "until_s": None}]
PLAYS = [*PAUSED, {"name": "program", "why": "steam runs", "since_s": 1.0, "until_s": None}]
SOON_S = time.time() + 60


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "This machine serves 64 experts in 8 blocks, and answers 1,203 tokens per second."),
        (
            {"held": {"serving": 1, "experts": 1}, "work": {"tokens_per_s": 0.1}},
            "This machine serves 1 expert in 1 block, and nobody asks for them right now.",
        ),
        (
            {"held": {"serving": 0, "experts": 0, "joining": 3}},
            "This machine fetches its first blocks: 3 blocks on the way.",
        ),
        ({"held": {"serving": 0, "experts": 0}}, "This machine has joined the run and holds no block yet."),
        (
            {"availability": {"reasons": PAUSED, "away": True, "until_s": SOON_S}},
            f"This machine is paused until {moment_text(SOON_S)}: its owner paused it.",
        ),
        (
            {"availability": {"reasons": PLAYS, "away": True}},
            "This machine is paused: its owner paused it and steam runs.",
        ),
        ({"availability": {"reasons": PAUSED}}, "This machine gives its blocks up to pause: its owner paused it."),
        (
            {"availability": {"reasons": PAUSED, "leaving": True}},
            "This machine hands its blocks over and leaves the run.",
        ),
    ],
)
def test_one_sentence_says_what_the_machine_does(changes: dict[str, Any], words: str) -> None:
    assert sentence(told(**changes)) == words


def used(now_s: float, cpu_s: float, sent_bytes: int = 0, **changes: Any) -> dict[str, Any]:
    return told(now_s=now_s, use={"cpu_s": cpu_s, "sent_bytes": sent_bytes}, **changes)


def test_rates_are_means_over_the_last_seconds() -> None:
    rates = RateWindow()
    rates.add(used(0.0, 0.0))
    assert rates.per_s("cpu_s") is None
    rates.add(used(2.0, 1.0, 400))
    assert (rates.per_s("cpu_s"), rates.per_s("sent_bytes")) == (0.5, 200.0)
    for second in range(4, 2 * int(WINDOW_S) + 2, 2):
        rates.add(used(float(second), 1.0, 400))
    assert rates.per_s("cpu_s") == 0.0


def test_another_host_and_a_clock_that_was_set_back_begin_anew() -> None:
    rates = RateWindow()
    for one in (used(0.0, 5.0), used(2.0, 6.0)):
        rates.add(one)
    rates.add(used(4.0, 0.1, started_s=950.0))
    assert rates.per_s("cpu_s") is None
    rates.add(used(1.0, 0.2, started_s=950.0))
    assert rates.per_s("cpu_s") is None


def test_a_long_silence_still_gives_a_rate() -> None:
    rates = RateWindow()
    rates.add(used(0.0, 0.0))
    rates.add(used(1000.0, 100.0))
    assert rates.per_s("cpu_s") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("reachability", "words"),
    [
        ("relayed", "Others call it through a relay."),
        ("not reached", "Others cannot call it."),
        ("something new", "Whether others can call it is not known yet."),
    ],
)
def test_the_page_is_told_how_the_machine_is_reached_with_its_credit_and_rates(reachability: str, words: str) -> None:
    rates = RateWindow()
    for one in (used(0.0, 0.0), used(2.0, 1.0)):
        rates.add(one)
    state = page_state(told(reachability=reachability), rates, CREDIT, "word")
    assert state["reached"] == words
    assert state["credit"]["confirmed"] == 6
    assert state["rates"] == {"cpu_percent": 50.0, "up_bytes_per_s": 0.0, "down_bytes_per_s": 0.0}
    assert (state["act_key"], state["problem"]) == ("word", "")


def test_without_a_host_the_page_says_so_and_has_no_word_for_actions() -> None:
    assert silent_state("it has ended") == {
        "problem": "it has ended",
        "sentence": "The host of this machine does not run, or does not answer.",
    }
