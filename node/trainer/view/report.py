"""What a training run leaves behind: `summary.json`, `loss.png` and the panel at the end.

The curve is read back from the event log rather than kept in memory, so that a run that was resumed shows all of it.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.atomic_file import write_atomically
from common.errors import InvalidInputError
from common.events import read_event
from common.folders import give_matplotlib_a_folder
from common.log_files import log_files
from common.text import clock_text, count_text, hosts_text, printable
from node.trainer.events import EvalEvent, StepEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import Console

    from node.trainer.events import DoneEvent

logger = logging.getLogger(__name__)

CURVE_FILE = "curve.json"
"""What is left of the files of the event log that are gone."""

KEPT_POINTS = 4000
MAX_POINTS = 2000
SMOOTHING_WINDOWS = 40
"""The smoothed line averages over this part of the run."""

SAMPLE_CHARS = 600


@dataclass(frozen=True, kw_only=True)
class Point:
    """Bits per byte after `tokens` of the run."""

    step: int
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss against tokens: one training point per step, one held-out point per evaluation."""

    train: tuple[Point, ...]
    held_out: tuple[Point, ...]


def read_curve(events: Path) -> Curve:
    """Read the event log `events` and what `keep_curve` kept of the files of it that are gone.

    Steps that were taken again after a resume count once, as taken last.
    """
    return _extended(_kept_curve(events), log_files(events))


def keep_curve(events: Path, going: Path) -> None:
    """Keep what the file `going` of the log `events` tells of the curve, before it is deleted. Raises OSError."""
    curve = _extended(_kept_curve(events), [going])
    kept = Curve(train=tuple(thinned(curve.train, KEPT_POINTS)), held_out=tuple(thinned(curve.held_out, KEPT_POINTS)))
    rows = {name: [tuple(asdict(point).values()) for point in points] for name, points in vars(kept).items()}
    write_atomically(events.with_name(CURVE_FILE), json.dumps(rows).encode())


def _kept_curve(events: Path) -> Curve:
    path = events.with_name(CURVE_FILE)
    try:
        rows = json.loads(path.read_bytes())
        parts = {
            name: tuple(
                Point(step=int(step), tokens=int(tokens), bits_per_byte=float(bits)) for step, tokens, bits in part
            )
            for name, part in rows.items()
        }
        return Curve(**parts)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("The curve of earlier steps in %s cannot be read: %s", path, error)
    return Curve(train=(), held_out=())


def _extended(curve: Curve, files: Sequence[Path]) -> Curve:
    train, held_out = list(curve.train), list(curve.held_out)
    for event in (event for file in files for event in _measured(file)):
        points = train if isinstance(event, StepEvent) else held_out
        while points and points[-1].step >= event.step:
            points.pop()
        points.append(Point(step=event.step, tokens=event.run_tokens, bits_per_byte=event.bits_per_byte))
    return Curve(train=tuple(train), held_out=tuple(held_out))


def _measured(events: Path) -> Iterator[StepEvent | EvalEvent]:
    """Every step and evaluation in the file; a line that a crash cut short, or of another version, is skipped."""
    with events.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(InvalidInputError):
                event = read_event(line, StepEvent) or read_event(line, EvalEvent)
                if event is not None:
                    yield event


def plot_loss(curve: Curve, path: Path, title: str) -> None:
    """Draw both curves into a PNG, atomically. Raises OSError."""
    # Matplotlib takes a third of a second to import, and `--help` reaches this module.
    from io import BytesIO  # noqa: PLC0415

    give_matplotlib_a_folder()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, curve)
    axes.set_title(title, loc="left", fontsize=11)
    buffer = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _draw(axes: Axes, curve: Curve) -> None:
    train = thinned(curve.train, MAX_POINTS)
    tokens = [point.tokens for point in train]
    bits = [point.bits_per_byte for point in train]
    axes.plot(tokens, bits, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(
        tokens,
        centred_mean(bits, len(bits) // SMOOTHING_WINDOWS),
        color="#2171b5",
        linewidth=1.6,
        label="training, smoothed",
    )
    held_out = [(point.tokens, point.bits_per_byte) for point in curve.held_out]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d94801", marker="o", markersize=4, label="held-out")
        axes.annotate(
            f"{held_out[-1][1]:.3f}", held_out[-1], (0, -14), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xlabel("tokens (bytes) trained on")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _position: count_text(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def centred_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` neighbours around each value, fewer at the ends: unlike a trailing mean it does not lag."""
    half = window // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(group) / len(group) for group in near]


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """Reduce to `limit` points: means over equally many tokens, the last of which names step and tokens.

    So points that were thinned before count for as much of the run as others, however few they are by now.
    """
    if len(points) <= limit:
        return list(points)
    first, span = points[0].tokens, points[-1].tokens - points[0].tokens + 1
    groups = [list(group) for _, group in groupby(points, lambda point: (point.tokens - first) * limit // span)]
    return [
        Point(
            step=group[-1].step,
            tokens=group[-1].tokens,
            bits_per_byte=sum(point.bits_per_byte for point in group) / len(group),
        )
        for group in groups
    ]


def report_files(out: Path) -> tuple[Path, Path, Path]:
    """What a run leaves in `out` for people and programs: its summary, its loss curve and its event log."""
    return out / "summary.json", out / "loss.png", out / "events.jsonl"


def write_report(out: Path, done: DoneEvent) -> None:
    """Write `summary.json` and `loss.png` into `out`, where `events.jsonl` is. Raises OSError."""
    summary, picture, events = report_files(out)
    write_atomically(summary, (json.dumps(asdict(done), indent=2) + "\n").encode())
    title = f"{done.run_id}: {done.experts:,} experts on {hosts_text(done.hosts)}"
    plot_loss(read_curve(events), picture, title)


def print_end(console: Console, done: DoneEvent) -> None:
    """The last thing that a run prints. Paths come below the panel, never folded: they are there to be copied."""
    console.print(final_panel(done))
    for path in done.files:
        console.print(Text(path), soft_wrap=True)


def final_panel(done: DoneEvent) -> Panel:
    """Draw the panel at the end: figures before and after, a text sample, and whose text was read."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    start, end = done.bits_per_byte_start, done.bits_per_byte_end
    better = Text(f"{end:.3f} bits/byte", style="bold green" if end < start else "bold red")
    grid.add_row("held-out", Text.assemble(f"{start:.3f} → ", better))
    if done.bytes_per_token != 1:
        nats = done.bytes_per_token * math.log(2)
        grid.add_row("", f"{start * nats:.3f} → {end * nats:.3f} nats/token")
    whose = f" by {done.trainers:,} trainers" if done.trainers > 1 else ""
    trained = f"{done.steps:,} steps, {done.tokens:,} tokens{whose} in {clock_text(done.wall_s)}"
    grid.add_row("trained", trained)
    grid.add_row("speed", f"{count_text(done.tokens_per_s)} tokens/s")
    grid.add_row("swarm", f"{done.experts:,} experts on {hosts_text(done.hosts)}, {done.calls_failed:,} calls failed")
    grid.add_row()
    grid.add_row("sample", Text(printable(done.sample)[:SAMPLE_CHARS], style="italic"))
    if done.attribution:
        grid.add_row()
        grid.add_row("data", Text(done.attribution, style="dim"))
    return Panel(grid, title=f"[bold]{done.run_id}[/]", title_align="left", border_style="green", expand=False)
