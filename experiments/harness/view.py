"""What a person sees while trials run: a bar for all of them, one for each that runs, and a line when one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from experiments.harness import worker
    from experiments.harness.experiment import Trial

PARTS = 1000


def new_bars(console: Console) -> Progress:
    """Make bars with `words` after them, which nobody sees but on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        console=console,
        disable=not console.is_terminal,
    )


class View:
    """Bars on a terminal; in a file a line for each trial that ends."""

    def __init__(self, name: str, console: Console) -> None:
        self._console = console
        self._bars = new_bars(console)
        self._all = self._bars.add_task(f"[bold]{name}", words="")
        self._tasks: dict[str, TaskID] = {}
        self._words: dict[str, str] = {}
        self._counts = (0, 0)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def plan(self, total: int, left: int) -> None:
        """How many trials can be named, and how many of them have no result."""
        done = total - left
        self._counts = (done, total)
        self._bars.update(self._all, total=total, completed=done, words=f"{done} of {total} trials")

    def started(self, trial: Trial) -> None:
        """A trial's bar."""
        self._tasks[trial.name] = self._bars.add_task(trial.name, total=PARTS, words="starting")

    def progress(self, trial: Trial, said: worker.TrialProgress) -> None:
        """How far it is."""
        self._words[trial.name] = said.words
        part = int(PARTS * said.done / max(said.total, 1))
        self._bars.update(self._tasks[trial.name], completed=part, words=said.words)

    def ended(self, trial: Trial, *, has_result: bool) -> None:
        """Its bar goes; its last words stay, if they are of a result."""
        self._bars.remove_task(self._tasks.pop(trial.name))
        done, total = self._counts
        words = self._words.pop(trial.name, "")
        words = words if has_result else "no result"
        self._console.print(f"{trial.name}: {words} ({done + 1} of {total})", highlight=False, soft_wrap=True)
