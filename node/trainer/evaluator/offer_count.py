"""How many offers a trainer has tried, on disk: each further one must show more, so the count outlives the process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from common.errors import CheckpointError, KilohiveError

if TYPE_CHECKING:
    from pathlib import Path

COUNT_FILE = "offers.json"


class OfferCount:
    """How many offers the trainer of a folder has tried in a run, over its whole life."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """Raises CheckpointError if the count so far cannot be read."""
        self._path, self._run_id = folder / COUNT_FILE, run_id
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
            self._tried = int(stored.get(run_id, 0))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"cannot read {self._path} ({error}): restore it, or delete it") from None

    def next(self) -> int:
        """The number of the one that is tried now, from 1, once it is on the disk."""
        self._tried += 1
        try:
            write_atomically(self._path, json.dumps({self._run_id: self._tried}).encode())
        except OSError as error:
            raise KilohiveError(f"cannot write {self._path}: {error.strerror}") from error
        return self._tried
