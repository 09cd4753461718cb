"""What a person sees of a training run: a live panel on a terminal, or plain lines. Fed by the trainer's events only.

`advance` folds an event into an immutable state, `render` draws a state; neither reads a clock or the network, and
nothing here can slow a step down: the emitting thread only swaps one reference.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.text import bytes_text, clock_text, count_text, hosts_text, printable, short_id, sparkline
from dht.view import pause_text
from node.trainer.events import (
    DoneEvent,
    EvalEvent,
    PausedHostsEvent,
    RetryEvent,
    StepEvent,
    TrunkCheckpointFailedEvent,
    WaitingEvent,
)
from node.trainer.view.report import print_end
from protocol.endpoints import endpoint_text
from protocol.node_events import TrainingStartEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from rich.console import RenderableType

    from common.events import Event, EventLog
    from node.trainer.events import HostLoad

REFRESH_PER_S = 4
PLAIN_EVERY_S = 5.0
PLAIN_EVERY_STEPS = 10
HISTORY = 2048
"""Points kept for the trends; older ones are thinned, so that the trend always spans the run."""

PANEL_ROWS = 18
"""Lines of the panel beside the rows of its table of hosts."""

MIN_BAR_WIDTH = 6
LABEL_WIDTH = 9
VALUE_WIDTH = 20
NOTICE_CHARS = 150
MAX_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class DisplayState:
    """All that the display knows. `start` and `step` are the latest events of those names."""

    start: TrainingStartEvent | None = None
    step: StepEvent | None = None
    train: tuple[float, ...] = ()
    held_out: tuple[float, ...] = ()
    first_held_out: float | None = None
    waiting: str = ""
    notice: str = ""
    paused: PausedHostsEvent | None = None
    done: DoneEvent | None = None


def advance(state: DisplayState, event: Event) -> DisplayState:
    """The state after `event`; events of other kinds change nothing."""
    match event:
        case WaitingEvent():
            state = replace(state, waiting=event.for_)
        case TrainingStartEvent():
            state = replace(state, start=event, waiting="")
        case StepEvent():
            train = _thinned((*state.train, event.bits_per_byte))
            state = replace(state, step=event, train=train, waiting="", notice="")
        case EvalEvent(bits_per_byte=bits):
            first = bits if state.first_held_out is None else state.first_held_out
            state = replace(state, held_out=_thinned((*state.held_out, bits)), first_held_out=first, waiting="")
        case RetryEvent():
            state = replace(state, notice=f"step {event.step} is tried again: {event.reason}")
        case TrunkCheckpointFailedEvent():
            state = replace(state, notice=event.reason)
        case PausedHostsEvent():
            state = replace(state, paused=event if event.total else None)
        case DoneEvent():
            state = replace(state, done=event)
    return state


def _paused_text(event: PausedHostsEvent) -> str:
    """How many hosts are paused, and what each says of that; the line is cut where the panel ends."""
    said = (f"{short_id(one.peer_id)} {pause_text(one.cause, one.since_s, one.until_s)}" for one in event.hosts)
    return f"{hosts_text(event.total)} paused: {', '.join(said)}"


def _thinned(points: tuple[float, ...]) -> tuple[float, ...]:
    if len(points) <= HISTORY:
        return points
    return tuple((a + b) / 2 for a, b in zip(points[::2], points[1::2], strict=False)) + points[len(points) & ~1 :]


def plain_line(state: DisplayState, step: StepEvent) -> str:
    """The latest step in one line."""
    held_out = f"  held-out {state.held_out[-1]:.3f}" if state.held_out else ""
    paused = f"  {hosts_text(state.paused.total)} paused" if state.paused else ""
    return (
        f"step {step.step}/{step.steps}  train {step.bits_per_byte:.3f}{held_out} bits/byte"
        f"  {count_text(step.tokens_per_s)} tokens/s"
        f"  {step.experts_alive:,}/{step.experts_total:,} experts alive{paused}"
        f"  {step.calls_failed:,} calls failed  {clock_text(step.time_left_s)} left"
    )


def render(state: DisplayState, width: int, height: int) -> RenderableType:
    """The panel for a terminal of `width` by `height` characters."""
    start = state.start
    title = f"[bold]kilohive[/] · {start.run_id}" if start else "[bold]kilohive[/]"
    parts: list[RenderableType] = []
    if state.step is not None:
        inner = min(width, MAX_WIDTH) - 4
        parts += [_progress(state.step, inner), Text(), _facts(state, state.step, inner)]
        parts += _host_table(state.step.hosts, inner, max(1, height - PANEL_ROWS - bool(state.paused)))
    elif start:
        parts.append(Text(_start_text(start)))
        parts.append(
            Text(f"held-out {state.held_out[-1]:.3f} bits/byte" if state.held_out else "measuring held-out text")
        )
    if state.paused:
        parts.append(Text(_paused_text(state.paused), style="yellow", no_wrap=True, overflow="ellipsis"))
    if message := _message(state):
        parts += [Text(), message] if parts else [message]
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", width=min(width, MAX_WIDTH))


def _start_text(start: TrainingStartEvent) -> str:
    # The trainer may be here before the first host.
    where = f" on {hosts_text(start.hosts)}" if start.hosts else ""
    return (
        f"{start.experts:,} experts{where}, {count_text(start.parameters_experts)} parameters in them, "
        f"{count_text(start.parameters_trunk)} in the trunk"
    )


def _message(state: DisplayState) -> Text | None:
    if state.waiting:
        return Text(f"waiting for {printable(state.waiting)}", style="bold yellow")
    if state.notice:
        return Text(printable(state.notice)[:NOTICE_CHARS], style="yellow")
    return Text("connecting to the swarm", style="dim") if state.start is None and state.step is None else None


def _progress(step: StepEvent, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=False)
    left = f"{clock_text(step.time_left_s)} left"
    label = f"step {step.step:,} of {step.steps:,}"
    grid.add_row(
        Text(label, style="bold"),
        ProgressBar(total=max(1, step.steps), completed=step.step, width=max(10, width - len(label) - len(left) - 8)),
        Text(f"{100 * step.step / max(1, step.steps):4.0f} %"),
        Text(left, style="bold"),
    )
    return grid


def _facts(state: DisplayState, step: StepEvent, width: int) -> RenderableType:
    trend = max(8, min(40, width - 52))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True, width=LABEL_WIDTH)
    grid.add_column(no_wrap=True, width=VALUE_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis", width=width - LABEL_WIDTH - VALUE_WIDTH - 4)
    grid.add_row("train", _bits(step.bits_per_byte), _trend(state.train, trend, f"loss {step.loss:.3f} nats/token"))
    held_out = _bits(state.held_out[-1]) if state.held_out else Text("not measured yet", style="dim")
    since = f"from {state.first_held_out:.3f}" if state.first_held_out is not None else ""
    grid.add_row("held-out", held_out, _trend(state.held_out, trend, since))
    speed = Text.assemble((count_text(step.tokens_per_s), "bold"), " tokens/s")
    in_flight = f"{step.in_flight} micro-batch{'es' * (step.in_flight != 1)} in flight"
    grid.add_row("speed", speed, f"{count_text(step.run_tokens)} tokens, {in_flight}")
    per_token = f"{step.wire_bytes_per_token:,.0f} bytes for each token and layer"
    grid.add_row("wire", bytes_text(step.wire_bytes), per_token)
    grid.add_row("experts", _experts(step), _calls(step))
    _add_sync_rows(grid, step)
    gate = step.gate
    balance = f"{100 * gate.dead_fraction:.0f} % idle, {gate.overflow:,} dropped"
    grid.add_row("gate", f"load spread {gate.load_cv:.2f}", f"entropy {gate.entropy_bits:.1f} bits, {balance}")
    share = gate.kept_fraction
    kept = "" if share is None else f"{100 * share:.0f} % of them kept since the evaluation before"
    grid.add_row("", f"{gate.effective_k:.1f} experts a token", kept)
    return grid


def _add_sync_rows(grid: Table, step: StepEvent) -> None:
    """How many replicas there are, and how far they are in sync."""
    replicas, versions, divergence = step.replicas, step.versions, step.divergence
    fewest = (f"{replicas.min} at least", "" if replicas.min else "bold red")
    trainers = f"{step.trainers} trainer" + "s" * (step.trainers != 1)
    grid.add_row(
        "replicas",
        Text.assemble(f"{replicas.mean:.1f} each, ", fewest),
        f"versions {count_text(versions.min)} to {count_text(versions.max)}, {trainers}",
    )
    staleness, exchanged = step.staleness, bytes_text(step.exchanged_bytes)
    grid.add_row(
        "averaging",
        f"{100 * max(divergence.trunk, divergence.blocks):.1f} % divergence",
        f"staleness {staleness.mean:.1f} (max {staleness.max:,}), {exchanged} exchanged",
    )


def _bits(value: float) -> Text:
    return Text.assemble((f"{value:.3f}", "bold"), " bits/byte")


def _trend(points: Sequence[float], width: int, note: str) -> Text:
    return Text.assemble((sparkline(points, width), "green"), "  " if points else "", (note, "dim"))


def _experts(step: StepEvent) -> Text:
    alive, total = step.experts_alive, step.experts_total
    return Text.assemble((f"{alive:,}", "bold" if alive == total else "bold red"), f"/{total:,} alive")


def _calls(step: StepEvent) -> Text:
    failed = step.calls_failed
    return Text.assemble(f"{step.calls_ok:,} calls answered, ", (f"{failed:,} failed", "red" if failed else ""))


def _host_table(hosts: Sequence[HostLoad], width: int, max_rows: int) -> list[RenderableType]:
    shown = sorted(hosts, key=lambda host: (-host.share, host.peer_id))[:max_rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("host", "left"), ("at", "left"), ("blocks", "right"), ("share of load", "left")):
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for name in ("queue", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for host in shown:
        table.add_row(*_host_row(host, max(MIN_BAR_WIDTH, min(30, width - 64))))
    rest = len(hosts) - len(shown)
    more: list[RenderableType] = [Text(f"and {rest} more hosts", style="dim")] if rest else []
    return [Text(), table, *more] if hosts else [Text(), Text("no host answers", style="bold red")]


def _host_row(host: HostLoad, bar_width: int) -> tuple[RenderableType, ...]:
    style = "dim strike" if host.avoided else ""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=1.0, completed=host.share, width=bar_width), f"{100 * host.share:3.0f} %")
    return (
        Text(short_id(host.peer_id), style=style),
        Text(endpoint_text(host.endpoint), style=style),
        f"{host.n_blocks:,}",
        bar,
        count_text(host.queue_tokens),
        count_text(host.tokens_per_s),
    )


@contextmanager
def open_display(events: EventLog, *, plain: bool) -> Iterator[Display]:
    """Show `events` on standard output until the block ends; see `Display`."""
    with Display(plain=plain) as display:
        events.subscribe(display.on_event)
        yield display


class Display:
    """Shows a trainer's events until the `with` block ends, and then how it ended.

    Live on a terminal, lines elsewhere or when `plain`. Leaving the block, however it is left, restores the terminal.
    """

    def __init__(self, *, plain: bool = False, console: Console | None = None) -> None:
        self._console = console or Console()
        self._state = DisplayState()
        self._lock = threading.Lock()
        self._live = None if plain or not self._console.is_terminal else self._new_live()
        self._borrowed: list[tuple[RichHandler, Console]] = []
        self._last_line_s = float("-inf")
        self._last_waiting = ""

    def _new_live(self) -> Live:
        return Live(console=self._console, refresh_per_second=REFRESH_PER_S, get_renderable=self._render)

    def _render(self) -> RenderableType:
        # Two columns stay free, so that the terminal's ^C does not wrap and push the panel's last drawing away.
        return render(self._state, self._console.width - 2, self._console.height)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._borrow_log()
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        for handler, console in self._borrowed:
            handler.console = console
        self._borrowed.clear()
        if self._state.done is not None:
            print_end(self._console, self._state.done)

    def _borrow_log(self) -> None:
        """Let log lines scroll above the panel; two consoles on one terminal would draw over each other."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, RichHandler):
                self._borrowed.append((handler, handler.console))
                handler.console = self._console

    def on_event(self, event: Event, t_s: float) -> None:
        """Take one event and its time, from any thread."""
        with self._lock:
            self._state = state = advance(self._state, event)
        if self._live is None and (line := self._line(event, t_s, state)):
            self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def _line(self, event: Event, t_s: float, state: DisplayState) -> str:
        match event:
            case TrainingStartEvent():
                return f"run {event.run_id}: {_start_text(event)}"
            case EvalEvent():
                return f"step {event.step}: {event.bits_per_byte:.3f} held-out bits/byte"
            case RetryEvent() | TrunkCheckpointFailedEvent():
                return state.notice
            case WaitingEvent() if state.waiting != self._last_waiting or self._due(t_s):
                self._last_line_s, self._last_waiting = t_s, state.waiting
                return f"waiting for {state.waiting}"
            case StepEvent() if event.step % PLAIN_EVERY_STEPS == 0 or event.step == event.steps or self._due(t_s):
                self._last_line_s, self._last_waiting = t_s, ""
                return plain_line(state, event)
        return ""

    def _due(self, t_s: float) -> bool:
        return t_s - self._last_line_s >= PLAIN_EVERY_S
