"""python -m tests.benchmarks.suite --record docs/results/benchmarks.md

Every benchmark, one after the other, each in a process of its own: rows to `runs/bench/NAME.json`, one table of all at
the end and, with `--record`, on a page, newest first. `--only codec,wire` runs some.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.harness.provenance import ROOT, commit, machine
from tests.benchmarks.report import Teller, table

BENCHMARKS = (
    "kernels",
    "codec",
    "wire",
    "security",
    "receipts",
    "dashboard",
    "scaling",
    "dispatch",
    "workload",
    "step",
    "generation",
    "serving",
    "density",
    "joining",
    "limits",
    "latency",
    "averaging",
    "replicas",
)
"""From seconds to half an hour; all of them take two hours on two cores."""
MARK = "<!-- newest first: tests.benchmarks.suite writes below this line -->\n"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All benchmarks, one table."""

    out: Path = Path("runs/bench")
    """Folder for the rows."""
    only: str = ",".join(BENCHMARKS)
    """Which, parted by commas."""
    record: Path | None = None
    """Page to put the table on."""


def main(config: Suite) -> None:
    """Run, print, record. Exit code 1 if one failed; the others are told all the same."""
    names, tell = chosen(config.only), Teller()
    if config.record is not None:
        check_page(config.record)  # before the hours, not after them
    failed = [name for name in names if not ran(name, config.out, tell)]
    contents = [json.loads((config.out / f"{name}.json").read_text()) for name in names if name not in failed]
    console = Console()
    for content in contents:
        console.print(table(content))
    if config.record is not None and contents:
        write_page(config.record, contents)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def chosen(names: str) -> list[str]:
    """By name; SystemExit naming the known ones for any other."""
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in BENCHMARKS]:
        raise SystemExit(f"--only: {', '.join(unknown)!r} is not known; known: {', '.join(BENCHMARKS)}")
    return wanted


def ran(name: str, out: Path, tell: Teller) -> bool:
    """Whether it came to its end. What it says goes to this terminal."""
    tell(f"{name}: python -m tests.benchmarks.{name}")
    rows = (out / f"{name}.json").resolve()
    rows.unlink(missing_ok=True)
    done = subprocess.run(
        (sys.executable, "-m", f"tests.benchmarks.{name}", "--json", str(rows)), cwd=ROOT, check=False
    )
    return done.returncode == 0 and rows.exists()


def check_page(page: Path) -> None:
    """SystemExit saying what is wrong with a page that no table can be put on."""
    if not page.is_file():
        raise SystemExit(f"--record: there is no {page}; name a page such as docs/results/benchmarks.md")
    if MARK not in page.read_text():
        raise SystemExit(f"--record: {page} has no line {MARK.strip()!r}")


def write_page(page: Path, contents: list[dict[str, Any]]) -> None:
    """Put a section with these rows on a page, below its mark."""
    page.write_text(page.read_text().replace(MARK, f"{MARK}\n{section(contents)}", 1))


def section(contents: list[dict[str, Any]]) -> str:
    """Markdown: one table for each benchmark."""
    about = machine()
    lines = [
        f"## {datetime.now(UTC):%Y-%m-%d}, {commit()}",
        "",
        f"{about['cores']} cores ({about['cpu']}), Python {about['python']}, torch {about['torch']}.",
        "",
    ]
    for content in contents:
        lines += [f"### {content['benchmark']} at {content['commit']}", ""]
        lines += [
            f"`python -m tests.benchmarks.{content['benchmark']} --json runs/bench/{content['benchmark']}.json`",
            "",
        ]
        lines += [
            "| case | metric | ours | against | theirs | ratio | runs |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [line_of(row) for row in content["rows"]]
        lines += ["", *map(item_of, content["machine"]["notes"]), ""]
    return "\n".join(lines)


def item_of(note: str) -> str:
    """A note as an item of a list, in lines that a reader of the source can take in."""
    return textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def line_of(row: dict[str, Any]) -> str:
    """One row of the table; its note, if any, stands beside whom it is against."""
    against = f"{row['against']} ({row['note']})" if row["note"] else row["against"]
    figures = ("-" if row[name] is None else f"{row[name]:,.10g}" for name in ("theirs", "ratio"))
    return (
        f"| {row['case']} | {row['metric']} | {row['ours']:,.10g} | {against} | {' | '.join(figures)} | {row['runs']} |"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Suite))
    except KeyboardInterrupt:
        sys.exit(130)
