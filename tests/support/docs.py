"""The documentation as tests read it: pages, fenced blocks, inline code, tables, commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(sorted([*ROOT.glob("*.md"), *(ROOT / "docker").glob("*.md"), *(ROOT / "docs").rglob("*.md")]))
NEEDS_A_SWARM = ("SwarmClient(", "secure_channel(", "load_model(")
"""Of a swarm that is up, or of a model that has left one."""
NEEDS_A_SERVER = "OpenAI("

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_COMMAND = re.compile(r"(time )?((\.venv/bin/)?python (run_node\.py|-m) |make [a-z])")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A fenced block and where it stands."""

    page: Path
    language: str
    code: str


def name_of(page: Path) -> str:
    """Path from the repository's root, for test ids and messages."""
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[Fence]:
    """Every fenced block of a page."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [Fence(page=page, language=language, code=code) for language, code in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    return _SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What `page.md#...` may point to: headings as GitHub names them."""
    headings = _HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(*, with_swarm: bool) -> list[Fence]:
    """Python examples: those that need a running swarm, or those that need nothing."""
    blocks = [fence for page in PAGES for fence in fences(page) if fence.language == "python"]
    blocks = [block for block in blocks if NEEDS_A_SERVER not in block.code]
    return [block for block in blocks if any(mark in block.code for mark in NEEDS_A_SWARM) == with_swarm]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command that a page tells people to type, as words without prefixes such as `time`."""
    for fence in fences(page):
        for line in fence.code.splitlines():
            if fence.language == "sh" and line and not line.startswith("#"):
                yield _words(line)
            elif fence.language == "console" and line.startswith("$ "):
                yield _words(line[2:])
    yield from (_words(span) for span in spans(page) if _COMMAND.match(span))


def _words(line: str) -> list[str]:
    words = shlex.split(line)
    words = words[words[0] == "time" :]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def table(page: Path, heading: str) -> list[list[str]]:
    """Rows of the first table under `heading`, cell by cell, without the table's own heading."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise AssertionError(f"{name_of(page)} has no heading {heading!r}")
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise AssertionError(f"{name_of(page)} has no table under {heading!r}")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code_in(cell: str) -> list[str]:
    """Inline code in a table's cell."""
    return _SPAN.findall(cell)
