"""What an experiment is made of: trials that can be run apart and resumed, and a report over their results.

`plan` is a function of the results so far. It is asked again until everything it names has a result, so an experiment
with stages (tune rates, then train with the best) needs no state of its own, and a run that was cut goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

Preset = Literal["quick", "full"]
Result = dict[str, Any]
"""What one trial found, as it stands in its JSON file."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One unit of work. `name` is its file's name; `spec`, JSON, is all that `run` is told.

    A trial that is several processes itself runs `alone`, however many may run at once.
    """

    name: str
    spec: dict[str, Any]
    alone: bool = False


class TrialContext(Protocol):
    """What a trial is given besides its spec, in a process of its own."""

    folder: Path
    """Its own, for checkpoints; removed once the trial has a result."""

    shared: Path
    """A folder of all trials of the run, for what a later one reads or each would compute again. Several may use
    it at once."""

    device: str
    """cpu, cuda, ..."""

    def progress(self, done: float, total: float, words: str) -> None:
        """Tell how far it is, as often as it likes."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says. `finding`: one sentence, computed from the results, "it does not" included.

    `tables`: Markdown by heading, in order; `figures`: drawings by file name's ending, each with its caption.
    """

    finding: str
    tables: dict[str, str]
    figures: dict[str, tuple[str, Figure]] = field(default_factory=dict)


class Experiment(Protocol):
    """One arm of the idea. A module holds one, named `EXPERIMENT`, and is listed in `experiments.harness.catalogue`."""

    name: str
    claim: str
    """What was said, in a sentence."""
    method: str
    """Markdown: what was done, and what it cannot show."""

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:
        """Every trial that can be named so far, those that have a result included. Pure."""

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        """Carry one trial out. Seeded by its spec; leaves what a resumed run needs in `context.folder`."""

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        """Read the results of a finished plan."""


def no_results(name: str, preset: Preset, of: str) -> ConfigError:
    """Make the error for a report that is asked for too early."""
    return ConfigError(f"{name}: no result yet of {of}; run_node.py experiment {name} --preset {preset} makes it")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the pages have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
