"""The end of a log in memory: the newest lines, none that is secret, and nothing once nobody listens."""

from __future__ import annotations

import logging

from common.log_tail import MAX_LINE_CHARS, NOT_KEPT, LogTail

logger = logging.getLogger(__name__)


def test_the_newest_lines_are_kept_with_their_level_and_time() -> None:
    with LogTail(max_lines=2).listening() as tail:
        for number in range(3):
            logger.warning("line %d", number)
    assert [(line.level, line.text) for line in tail.lines] == [("warning", "line 1"), ("warning", "line 2")]
    assert tail.lines[0].t_s <= tail.lines[1].t_s


def test_a_secret_line_is_not_kept_and_a_long_one_is_cut() -> None:
    with LogTail().listening() as tail:
        logger.warning("the token is x", extra={NOT_KEPT: True})
        logger.warning("y" * 5000)
    assert [line.text for line in tail.lines] == ["y" * MAX_LINE_CHARS]


def test_nothing_is_kept_after_its_context() -> None:
    with LogTail().listening() as tail:
        pass
    logger.warning("too late")
    assert tail.lines == ()
