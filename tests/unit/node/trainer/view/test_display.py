"""The display says, in any width, how training goes; and gives the terminal back."""

from __future__ import annotations

import io
import logging
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.logging import RichHandler

from common.events import EventLog
from common.text import bytes_text, clock_text, count_text, moment_text, printable, short_id, sparkline
from node.host.events import CheckpointEvent
from node.trainer.events import PausedHost, PausedHostsEvent, RetryEvent, TrunkCheckpointFailedEvent
from node.trainer.view.display import HISTORY, Display, DisplayState, advance, open_display, plain_line, render
from tests.support.trainer_events import PEERS, T_S, done, evaluation, host, start, step, step_s, waiting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.events import Event

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


def after(events: Iterable[Event]) -> DisplayState:
    state = DisplayState()
    for event in events:
        state = advance(state, event)
    return state


def shown(state: DisplayState, width: int = 80, height: int = 40) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(render(state, width, height))
    return capture.get()


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=40, _environ={}), file


def plain() -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display(plain=True, console=Console(file=file, width=80)), file


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_panel_shows_every_number_and_stays_inside_the_terminal(width: int) -> None:
    text = shown(after([start(), evaluation(0, 8.01), step(1), evaluation(50, 3.9), step(120)]), width)
    for words in (
        "demo-0123456789ab",
        "step 120 of 400",
        "30 %",
        "2:20 left",
        "3.400 bits/byte",
        "3.900 bits/byte",
        "from 8.010",
        "5,123 tokens/s",
        "1,024/1,024 alive",
        "0 failed",
        "2 micro-batches in flight",
        "1.01 GB",
        "4,251 bytes for each token and layer",
        "load spread 0.43",
        "1.5 each, 1 at least",
        "versions 1,203 to 1,450, 1 trainer",
        "3.1 % divergence",
        "staleness 1.2 (max 12), 1.2 GB exchanged",
        "…3VdZ00",
        "127.0.0.1:40000",
        "25 %",
        "2,048",
    ):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= width
    assert "…\n" not in text


def test_before_the_first_event_it_says_that_it_connects() -> None:
    assert "connecting to the swarm" in shown(DisplayState())


def test_waiting_is_visible_until_something_happens() -> None:
    state = after([waiting()])
    assert "waiting for hosts: 12 of 32 blocks have no live replica" in shown(state)
    state = advance(state, start())
    assert "waiting" not in shown(state)
    assert "1,024 experts on 4 hosts" in shown(state)
    state = after([start(), step(1), waiting()])
    assert "waiting for hosts" in shown(state)
    assert "waiting" not in shown(advance(state, step(2)))


def test_a_retry_and_a_failed_checkpoint_are_told_until_the_next_step() -> None:
    state = after([start(), step(1), RetryEvent(step=2, reason="layer 1: peers left")])
    assert "step 2 is tried again: layer 1: peers left" in shown(state)
    assert "tried again" not in shown(advance(state, step(2)))
    assert "disk is full" in shown(advance(state, TrunkCheckpointFailedEvent(reason="disk is full")))


def test_more_hosts_than_lines_are_counted_and_the_busiest_come_first() -> None:
    rows = tuple(host(i, share=i / 1000) for i in range(40))
    text = shown(after([start(), step(1, hosts=rows)]), height=24)
    assert len(text.splitlines()) <= 24
    assert "…3VdZ39" in text
    assert "…3VdZ00" not in text
    assert "and 34 more hosts" in text


def test_without_hosts_it_says_so() -> None:
    assert "no host answers" in shown(after([start(), step(1, hosts=())]))


def paused(*hosts: PausedHost) -> PausedHostsEvent:
    return PausedHostsEvent(hosts=hosts, total=len(hosts))


RESTS = PausedHost(peer_id=PEERS[3], cause="owner", since_s=1e9, until_s=1.00001e9)
PLAYS = PausedHost(peer_id=PEERS[4], cause="condition", since_s=1e9, until_s=0.0)


def test_hosts_that_are_paused_are_shown_with_what_they_say_of_that_until_they_work_again() -> None:
    state = after([start(), step(1), paused(RESTS, PLAYS)])
    since, until = moment_text(1e9), moment_text(1.00001e9)
    words = f"2 hosts paused: …3VdZ03 by its owner since {since} until {until}, …3VdZ04 by its owner's conditions since"
    assert words in shown(state, width=160)
    assert "  2 hosts paused  " in plain_line(state, step(2))
    state = after([start(), step(1), paused(RESTS), paused()])
    assert "paused" not in shown(state, width=160) + plain_line(state, step(2))


@pytest.mark.parametrize("width", [80, 100])
def test_many_paused_hosts_are_cut_at_the_end_of_the_line(width: int) -> None:
    rows = tuple(host(i) for i in range(40))
    text = shown(after([start(), step(1, hosts=rows), paused(*[RESTS] * 40)]), width, height=24)
    assert len(text.splitlines()) <= 24
    assert "40 hosts paused: …3VdZ03" in text
    assert max(map(len, text.splitlines())) <= width


def test_unknown_events_change_nothing() -> None:
    state = after([start(), step(1)])
    assert advance(state, CheckpointEvent(blocks=1, seconds=0.1)) == state


def test_a_peers_words_cannot_reach_the_terminal_as_control_characters() -> None:
    assert "\x1b" not in shown(after([waiting("\x1b[2J[bold]x")]))
    assert "[bold]x" in shown(after([waiting("\x1b[2J[bold]x")]))


def test_the_trend_spans_the_whole_run_however_long() -> None:
    state = after(step(i, bits_per_byte=8.0 if i < 5000 else 2.0) for i in range(1, 10_001))
    assert len(state.train) <= HISTORY
    assert sparkline(state.train, 10)[0] == "█"
    assert sparkline(state.train, 10)[-1] == "▁"


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.integers(1, 20))
def test_a_sparkline_has_a_cell_per_point_up_to_its_width(points: list[float], width: int) -> None:
    assert len(sparkline(points, width)) == min(len(points), width)


def test_a_sparkline_goes_from_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5, 5], 3) == "▁▁▁"


def test_numbers_are_written_for_people() -> None:
    assert [clock_text(s) for s in (-1, 0, 59.6, 3599, 3600)] == ["0:00", "0:00", "1:00", "59:59", "1:00:00"]
    assert [bytes_text(n) for n in (0, 999, 1000, 4_200_000, 5e15)] == ["0 B", "999 B", "1 kB", "4.2 MB", "5e+03 TB"]
    assert [count_text(n) for n in (0, 1234.4, 1e6)] == ["0", "1,234", "1.00 M"]
    assert short_id("12D3KooWabcdef") == "…abcdef"
    assert printable("a\x1b[0m\tb\nc") == "a·[0m·b\nc"


def test_plain_lines_come_every_ten_steps_or_five_seconds_and_at_evaluations() -> None:
    display, file = plain()
    with display:
        display.on_event(start(), T_S)
        for i in range(1, 21):
            display.on_event(step(i), T_S + 0.1 * i)
        display.on_event(evaluation(20, 3.9), step_s(20))
        display.on_event(step(21), T_S + 100.0)
    assert file.getvalue().splitlines() == [
        "run demo-0123456789ab: 1,024 experts on 4 hosts, 8.40 M parameters in them, 330,000 in the trunk",
        "step 1/400  train 3.400 bits/byte  5,123 tokens/s  1,024/1,024 experts alive  0 calls failed  3:20 left",
        "step 10/400  train 3.400 bits/byte  5,123 tokens/s  1,024/1,024 experts alive  0 calls failed  3:15 left",
        "step 20/400  train 3.400 bits/byte  5,123 tokens/s  1,024/1,024 experts alive  0 calls failed  3:10 left",
        "step 20: 3.900 held-out bits/byte",
        (
            "step 21/400  train 3.400  held-out 3.900 bits/byte  5,123 tokens/s  1,024/1,024 experts alive"
            "  0 calls failed  3:10 left"
        ),
    ]


def test_the_last_step_always_has_a_plain_line() -> None:
    display, file = plain()
    with display:
        display.on_event(step(1, steps=3), step_s(1))
        display.on_event(step(2, steps=3), step_s(2))
        display.on_event(step(3, steps=3), step_s(3))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/3", "3/3"]


def test_plain_waiting_is_said_at_once_then_every_five_seconds() -> None:
    display, file = plain()
    with display:
        for t in (0.0, 1.0, 4.9, 5.0, 6.0):
            display.on_event(waiting(), T_S + t)
        display.on_event(waiting("hosts: 3 of 32"), T_S + 6.1)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "waiting for hosts: 3 of 32"


def test_no_terminal_means_plain_lines() -> None:
    file = io.StringIO()
    with Display(console=Console(file=file, width=80)) as display:
        display.on_event(start(), T_S)
    assert file.getvalue().startswith("run demo-0123456789ab")
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_terminal_is_given_back_however_the_block_ends(error: type[BaseException] | None) -> None:
    console, file = terminal()
    try:
        with Display(console=console) as display:
            display.on_event(start(), T_S)
            display.on_event(step(1), step_s(1))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    written = file.getvalue()
    assert HIDE_CURSOR in written
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    assert "step 1 of 400" in written


def test_log_lines_go_through_the_panels_console_and_back(caplog: pytest.LogCaptureFixture) -> None:
    console, file = terminal()
    own = Console(file=io.StringIO(), width=80)
    handler = RichHandler(console=own, show_path=False, show_time=False)
    logging.getLogger().addHandler(handler)
    try:
        with Display(console=console):
            logging.getLogger("x").warning("above the panel")
        logging.getLogger("x").warning("after the panel")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "above the panel" in file.getvalue()
    assert "after the panel" not in file.getvalue()
    assert handler.console is own


def test_the_end_is_shown_once_the_panel_is_closed() -> None:
    console, file = terminal()
    with Display(console=console) as display:
        display.on_event(start(), T_S)
        display.on_event(done(), T_S + 200.0)
        assert "8.010" not in file.getvalue()
    assert "8.010 → " in file.getvalue()


def test_events_reach_an_open_display_from_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    events = EventLog()
    with open_display(events, plain=True):
        threads = [threading.Thread(target=lambda: events.emit(evaluation(0, 8.0))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert capsys.readouterr().out.count("held-out bits/byte") == 8
