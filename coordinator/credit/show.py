"""Sums of credit for people and programs: tables for a terminal, CSV, JSON. Pure; names stand beside peer ids."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.text import short_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from coordinator.credit.sums import CreditSums, HostSum, TrainerSum

MAX_SHOWN = 40
COLUMNS: Final = (
    "role",
    "peer_id",
    "name",
    "team",
    "forward_pairs",
    "backward_pairs",
    "tokens_learnt",
    "receipts",
    "own_tokens",
    "capped",
)
FORMULA: Final = ("=", "+", "-", "@")
"""How a cell begins that a spreadsheet would compute."""


def render_sums(sums: CreditSums) -> RenderableType:
    """The run, its hosts, its trainers, their teams, and what does not count yet."""
    hosts = _table(("host", "name", "team"), ("forward pairs", "backward pairs", "receipts"))
    for host in sums.hosts[:MAX_SHOWN]:
        hosts.add_row(*_who(host), f"{host.forward_pairs:,}", f"{host.backward_pairs:,}", f"{host.receipts:,}")
    trainers = _table(("trainer", "name", "team"), ("tokens learnt", "announced", "receipts"))
    for trainer in sums.trainers[:MAX_SHOWN]:
        learnt = Text(f"{trainer.tokens_learnt:,}", style="bold red" if trainer.capped else "")
        trainers.add_row(*_who(trainer), learnt, f"{trainer.own_tokens:,}", f"{trainer.receipts:,}")
    teams = _table(("team",), ("peers", "forward pairs", "backward pairs", "tokens learnt"))
    for team in sums.teams[:MAX_SHOWN]:
        numbers = (team.peers, team.forward_pairs, team.backward_pairs, team.tokens_learnt)
        teams.add_row(Text(team.team), *(f"{number:,}" for number in numbers))
    spaced = [item for table in (hosts, trainers, teams) if table.row_count for item in (Text(), table)]
    return Group(Text.assemble("run ", (sums.run_id, "bold")), *spaced, *_last_lines(sums))


def sums_json(sums: CreditSums) -> str:
    """Return all of it, for programs."""
    return json.dumps(asdict(sums), indent=2, ensure_ascii=False) + "\n"


def sums_csv(sums: CreditSums) -> str:
    """A line for each host and each trainer, under the names of the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    rows = [("host", asdict(host)) for host in sums.hosts] + [("trainer", asdict(one)) for one in sums.trainers]
    for role, row in rows:
        words = {name: _harmless(str(row[name])) for name in ("name", "team")}
        writer.writerow({"role": role, **row, **words})
    return text.getvalue()


def _last_lines(sums: CreditSums) -> list[Text]:
    lines = []
    rest = max(0, len(sums.hosts) - MAX_SHOWN) + max(0, len(sums.trainers) - MAX_SHOWN)
    if not sums.hosts:
        lines.append(Text("nobody has earned anything yet", style="dim"))
    if rest:
        lines.append(Text(f"and {rest} more peers, which the files of --csv and --json have", style="dim"))
    if any(trainer.capped for trainer in sums.trainers):
        words = "in red: its receipts come to more tokens than it has announced, and count in part"
        lines.append(Text(words, style="dim"))
    if sums.unseen_receipts:
        words = f"{sums.unseen_receipts:,} receipts are of peers that were not seen in the run, and earn nothing yet"
        lines.append(Text(words, style="dim"))
    return [Text(), *lines] if lines else []


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _who(peer: HostSum | TrainerSum) -> tuple[Text, Text, Text]:
    """Return cells that are no markup, whatever is in a name."""
    return Text(short_id(peer.peer_id)), Text(peer.name or "-"), Text(peer.team or "-")


def _harmless(word: str) -> str:
    """Return the word so that no spreadsheet takes it for a formula."""
    return f"'{word}" if word.startswith(FORMULA) else word
