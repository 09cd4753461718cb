"""Results of trials on disk, one JSON file each, and what is published of them all.

A result counts only for the spec that it was made with: changing a trial's spec has it run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common.atomic_file import write_atomically
from common.errors import ConfigError
from experiments.harness.provenance import commit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from experiments.harness.experiment import Result, Trial


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One result, the spec that it belongs to, and the commit that was checked out then."""

    spec: dict[str, Any]
    result: Result
    commit: str = ""


class ResultStore:
    """Results below `folder`, and those published in `page` (a JSON file that need not be there)."""

    def __init__(self, folder: Path, page: Path) -> None:
        self._folder = folder
        self._known = {name: Stored(**row) for name, row in _read(page).get("trials", {}).items()}
        for path in sorted((folder / "trials").glob("*.json")):
            self._known[path.stem] = Stored(**_read(path))

    def results(self, trials: Iterable[Trial]) -> dict[str, Result]:
        """Return the results of those trials that have one."""
        return {trial.name: self._known[trial.name].result for trial in trials if self.has(trial)}

    def all(self) -> dict[str, Result]:
        """Every result, for a plan that looks at what came before."""
        return {name: stored.result for name, stored in self._known.items()}

    def has(self, trial: Trial) -> bool:
        """Whether there is a result of exactly this trial."""
        stored = self._known.get(trial.name)
        return stored is not None and stored.spec == json.loads(json.dumps(trial.spec))

    def keep(self, trial: Trial, result: Result) -> None:
        """Write one result."""
        stored = Stored(spec=json.loads(json.dumps(trial.spec)), result=result, commit=commit())
        write_atomically(self._folder / "trials" / f"{trial.name}.json", json.dumps(asdict(stored)).encode())
        self._known[trial.name] = stored

    def published(self, trials: Iterable[Trial]) -> dict[str, Any]:
        """Specs and results by name, as the published file has them."""
        return {trial.name: asdict(self._known[trial.name]) for trial in trials if self.has(trial)}

    @property
    def shared(self) -> Path:
        """Folder of what trials leave for later ones."""
        return self._folder / "shared"

    def scratch(self, trial: Trial) -> Path:
        """Folder of a trial that is not done."""
        return self._folder / "unfinished" / trial.name


def _read(path: Path) -> Mapping[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): delete it, and its trials run again") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds no results: delete it, and its trials run again")
    return table
