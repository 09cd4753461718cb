"""Texts of others as a terminal may show them."""

from __future__ import annotations

import pytest

from common.text import escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\u202eevil", r"\u202eevil"),
        ("\U000e0041", r"\U000e0041"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_or_not_show_is_written_out_on_one_line(text: str, shown: str) -> None:
    assert escaped(text) == shown
