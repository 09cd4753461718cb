"""An experiment whose trials take no time, fail, die or never end: for tests of what runs them."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from common.errors import DataError
from experiments.harness.experiment import Report, Trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.harness.experiment import Preset, Result, TrialContext


class Small:
    name = "small"
    claim = "Squares can be summed."
    method = "Squares first, then their sum, as a second stage."

    def __init__(self, *, kinds: Sequence[str] = ("square",), alone: bool = False) -> None:
        self.kinds, self.alone = kinds, alone

    def plan(self, preset: Preset, results: Mapping[str, Result]) -> Sequence[Trial]:
        squares = [
            Trial(name=f"{kind}-{n}", spec={"kind": kind, "n": n}, alone=self.alone)
            for kind in self.kinds
            for n in (2, 3)
        ]
        values = [results[trial.name]["value"] for trial in squares if trial.name in results]
        if len(values) < len(squares):
            return squares
        return [*squares, Trial(name="sum", spec={"kind": "sum", "n": values})]

    def run(self, spec: dict[str, Any], context: TrialContext) -> Result:
        context.progress(0, 1, f"{spec['kind']} begins")
        match spec["kind"]:
            case "sum":
                return {"value": sum(spec["n"]), "left": sorted(path.name for path in context.shared.iterdir())}
            case "fails":
                raise DataError(f"there is no {spec['n']}")
            case "breaks":
                return {"value": 1 // (spec["n"] - spec["n"])}
            case "threads":
                import torch  # noqa: PLC0415 - the other trials do without

                return {"value": torch.get_num_threads()}
            case "dies":
                os._exit(7)
            case "waits":
                mark = context.folder / "checkpoint"
                if mark.exists():
                    return {"value": 0}
                mark.touch()
                # Has a name in the system, as those of libraries that trials use.
                self.lock = multiprocessing.get_context("spawn").Lock()
                context.progress(0.5, 1, "waiting")
                while True:
                    time.sleep(0.05)
        (context.shared / str(spec["n"])).touch()
        return {"value": spec["n"] ** 2}

    def report(self, preset: Preset, results: Mapping[str, Result]) -> Report:
        figure = Figure()
        figure.subplots().plot([1, 2])
        return Report(
            finding=f"The sum is {results['sum']['value']}.",
            tables={"Values": "| a |\n| --- |\n| 1 |"},
            figures={"line": ("A line", figure)},
        )


EXPERIMENT = Small()
