"""What the docs say that a user may read on a terminal is what the code writes there."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.support.docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = ("docs/joining.md", "docs/running.md")
ROOMS = ("common", "protocol", "dht", "node", "coordinator", "experiments")
HEADER = "| it says |"
VARIABLE = re.compile(r"\S*[\d/'\"<>()]\S*|:(?= )")
"""What stands for something else in a message, a number, a path or a name in quotes, or joins two sentences."""

PLACEHOLDER = re.compile(r"%[sdrg]|%\.?\d*[fg]|\{[^}]*\}|\$\(.*?\)")


def documented() -> Iterator[tuple[str, str]]:
    """Every message in the first column of a table that is headed so, with its page."""
    for page in PAGES:
        in_table = False
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            in_table = line.startswith(HEADER) or (in_table and line.startswith("|"))
            if in_table and (found := re.match(r"\| `(.+?)` \|", line)):
                yield page, found[1]


@cache
def written() -> tuple[str, ...]:
    """Every text of the product, with a blank where something is put in; and the Makefile."""
    texts = [PLACEHOLDER.sub(" ", (ROOT / "Makefile").read_text(encoding="utf-8"))]
    files = [ROOT / "run_node.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else " " for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(PLACEHOLDER.sub(" ", node.value))
    return tuple(" ".join(text.split()) for text in texts)


def pieces(message: str) -> list[str]:
    """The parts of a message that are the same whatever it is about."""
    return [" ".join(piece.split()) for piece in VARIABLE.split(message) if len(piece.split()) > 1]


def test_the_pages_have_messages() -> None:
    found = list(documented())
    assert {page for page, _ in found} == set(PAGES)
    assert len(found) > 20


@pytest.mark.parametrize(("page", "message"), list(documented()))
def test_a_message_of_the_docs_is_one_that_the_code_writes(page: str, message: str) -> None:
    wanted = pieces(message) or [message]
    for piece in wanted:
        assert any(piece in text for text in written()), f"{page}: nothing says {piece!r}"
