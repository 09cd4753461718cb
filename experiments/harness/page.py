"""The page of an experiment: finding, claim, method, tables, plots, and the JSON that they were made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.atomic_file import write_atomically
from common.figures import save_svg
from experiments.harness.provenance import commit, machine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from experiments.harness.experiment import Experiment, Preset, Report, Trial
    from experiments.harness.store import ResultStore


@dataclass(frozen=True, kw_only=True)
class ResultPage:
    """What was written."""

    finding: str
    path: Path


def publish(
    experiment: Experiment, preset: Preset, trials: Sequence[Trial], store: ResultStore, folder: Path
) -> ResultPage:
    """Write NAME.md, NAME.json and a drawing for each figure into `folder`."""
    report = experiment.report(preset, store.results(trials))
    document = {
        "experiment": experiment.name,
        "preset": preset,
        "claim": experiment.claim,
        "finding": report.finding,
        "commit": commit(),
        "machine": machine(),
    }
    rows = store.published(trials)
    write_atomically(folder / f"{experiment.name}.json", json_text(document, rows).encode())
    for ending, (_, figure) in report.figures.items():
        save_svg(figure, folder / f"{experiment.name}_{ending}.svg")
    path = folder / f"{experiment.name}.md"
    done = f"{len(rows)} of {len(trials)}"
    write_atomically(path, text_of(experiment, preset, done, report).encode())
    return ResultPage(finding=report.finding, path=path)


def json_text(document: Mapping[str, Any], trials: Mapping[str, Any]) -> str:
    """The published file, a line for each trial: a trial that ran again is one line of a difference."""
    head = json.dumps(document, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in trials.items())
    return f'{head},\n "trials": {{\n{lines}\n }}\n}}\n'


def text_of(experiment: Experiment, preset: Preset, done: str, report: Report) -> str:
    """The page's Markdown."""
    name = experiment.name
    parts = [
        f"# {name.replace('_', ' ').capitalize()}",
        f"**{report.finding}**",
        f"The claim: {experiment.claim}",
        (
            f"`python run_node.py experiment {name} --preset {preset}` makes this page, its plots and [{name}.json]"
            f"({name}.json), which holds {done} trials with their specs. It goes on where it was stopped."
        ),
        "## What was done",
        experiment.method.strip(),
    ]
    for heading, table in report.tables.items():
        parts += [f"## {heading}", table.strip()]
    if report.figures:
        parts += ["## Plots"]
        parts += [f"![{caption}]({name}_{ending}.svg)" for ending, (caption, _) in report.figures.items()]
    return "\n\n".join(parts) + "\n"
