"""What every benchmark shares: alternating runs, medians, rows as JSON, a table, lines that tell what is going on."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path  # noqa: TC003 - tyro reads the annotation
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from experiments.harness.provenance import commit, machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MIN_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Of every benchmark whose figures are medians."""

    json: Path
    """File for the rows."""
    runs: int = MIN_RUNS
    """Counted runs of each; fewer than 5 are for a look, not for the docs."""

    def publish(self, benchmark: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
        """Write and print them, and say it where the runs are too few."""
        few = () if self.runs >= MIN_RUNS else (f"only {self.runs} runs: not for the docs",)
        publish(self.json, document(benchmark, rows, (*notes, *few)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `theirs` and `ratio` are None where there is nothing to compare with; `note` says why."""

    case: str
    metric: str
    ours: float
    against: str
    theirs: float | None
    ratio: float | None
    runs: int
    ours_runs: tuple[float, ...]
    theirs_runs: tuple[float, ...] = ()
    note: str = ""


def compare(case: str, metric: str, ours: Sequence[float], against: str, theirs: Sequence[float]) -> Row:
    """Medians of both and their ratio; a note where the other had fewer runs."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    return Row(
        note="" if len(theirs) == len(ours) else f"median of {len(theirs)} runs, ours of {len(ours)}",
        case=case,
        metric=metric,
        ours=_rounded(mine),
        against=against,
        theirs=_rounded(other),
        ratio=_rounded(mine / other),
        runs=len(ours),
        ours_runs=tuple(map(_rounded, ours)),
        theirs_runs=tuple(map(_rounded, theirs)),
    )


def not_compared(case: str, metric: str, ours: Sequence[float], against: str, why: str) -> Row:
    """A row for a contender that was not run."""
    return Row(
        case=case,
        metric=metric,
        ours=_rounded(statistics.median(ours)),
        against=against,
        theirs=None,
        ratio=None,
        runs=len(ours),
        ours_runs=tuple(map(_rounded, ours)),
        note=why,
    )


def schedule(names: Sequence[str], runs: int) -> list[tuple[str, int]]:
    """Who runs when: round 0 warms each up, then they take turns, so that a slow minute of the machine hits all."""
    return [(name, round_) for round_ in range(runs + 1) for name in names]


def alternate(
    contenders: Mapping[str, Callable[[], float]],
    runs: int,
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    """Each contender's figures of `runs` rounds, without the warm-up's."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for name, round_ in schedule(list(contenders), runs):
        figure = contenders[name]()
        tell(f"{'warm-up' if not round_ else f'round {round_} of {runs}'}: {name} {figure:,.1f}")
        if round_:
            figures[name].append(figure)
    return figures


class Teller:
    """Lines on standard error with the seconds since the start; standard output is for the table."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:6.1f} s  {text}", soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say `text` and, on a terminal, show that something moves until the block ends."""
        self(text)
        with self._console.status(text):
            yield


def document(benchmark: str, rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """The JSON of one benchmark."""
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": {**machine(), "notes": list(notes)},
        "rows": [asdict(row) for row in rows],
    }


def publish(path: Path, content: Mapping[str, Any]) -> None:
    """Write the JSON to `path` and the table to standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    console = Console()
    console.print(table(content))
    console.print(f"Rows: {path}", soft_wrap=True)


def table(content: Mapping[str, Any]) -> Group:
    """Rows as people read them, and below them their notes."""
    what = Table("case", "metric", title=f"{content['benchmark']} at {content['commit']}")
    for name in ("ours", "against", "theirs", "ratio", "runs"):
        what.add_column(name, justify="left" if name == "against" else "right")
    for row in content["rows"]:
        what.add_row(
            row["case"],
            row["metric"],
            _number(row["ours"]),
            row["against"],
            _number(row["theirs"]),
            _number(row["ratio"]),
            str(row["runs"]),
        )
    # One line for a note that several rows share.
    notes = dict.fromkeys(f"{row['against']}: {row['note']}" for row in content["rows"] if row["note"])
    return Group(what, *notes)


def _rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.10g}"
