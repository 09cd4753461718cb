"""python -m tests.benchmarks.latency_plot --rows runs/bench --out docs/results

Draws what `latency` and `latency_grid` have written to `latency.json` and `latency_grid.json`: `latency.svg` and
`latency_grid.svg`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from matplotlib.figure import Figure

from common.figures import save_svg
from tests.benchmarks.latency import SPEED
from tests.benchmarks.swarm_training import LOSS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.axes import Axes

WIDE, HIGH = 9.0, 3.6
SPEEDS, LOSSES = "latency", "latency_grid"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw latency's figures."""

    rows: Path = Path("runs/bench")
    """Folder with the rows."""
    out: Path = Path("docs/results")
    """Folder for the drawings."""


def main(config: Plot) -> None:
    """Read, draw, say where."""
    for name, draw in ((SPEEDS, draw_speeds), (LOSSES, draw_grid)):
        source = config.rows / f"{name}.json"
        if not source.is_file():
            raise SystemExit(f"--rows: no {source}; python -m tests.benchmarks.{name} --json {source} makes it")
        figure = draw(json.loads(source.read_text())["rows"])
        config.out.mkdir(parents=True, exist_ok=True)
        path = config.out / f"{name}.svg"
        save_svg(figure, path)
        print(path)


def draw_speeds(rows: list[dict[str, Any]]) -> Figure:
    """Speed and loss by mean delay, with failures and without."""
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, metric in ((left, SPEED), (right, LOSS)):
        _by_delay(axes, [row for row in rows if row["metric"] == metric])
        axes.set_xscale("log")
        axes.set_xlabel("mean delay of a call, ms")
        axes.set_ylabel(f"{metric}, against no delay")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.legend()
    left.set_ylim(0, 1.1)
    right.set_ylim(0.9, 1.1)
    return figure


def draw_grid(rows: list[dict[str, Any]]) -> Figure:
    """Loss by number of experts, a line for each network, a panel for each task."""
    tasks = list(dict.fromkeys(row["case"].split(",")[0] for row in rows))
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [row for row in rows if row["case"].startswith(f"{task},")]
        for network, points in _by_network(own).items():
            axes.plot(list(points), list(points.values()), marker="o", label=network)
        axes.set_title(task)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("experts of a layer")
        axes.set_ylabel(f"{own[0]['metric']}, against no delay")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_ylim(0.85, 1.15)
        axes.legend(fontsize="small")
    return figure


def _by_delay(axes: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        delay, _, lost = row["case"].removeprefix("mean delay ").partition(" ms")
        lines[lost.removeprefix(", ") or "no failures"][int(delay)] = row["ratio"]
    for label, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=label)


def _by_network(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Ratio by number of experts, by what the network does."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        found = re.fullmatch(r"\w+, ([\d,]+) experts, (.*)", row["case"])
        if found:
            lines[found[2]][int(found[1].replace(",", ""))] = row["ratio"]
    return lines


if __name__ == "__main__":
    main(tyro.cli(Plot))
