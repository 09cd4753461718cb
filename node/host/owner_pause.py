"""The owner's own pause: it holds until `resume`, or until a moment that was named.

A file keeps it over a restart. `pause` writes the moment there and then sends its signal, which can carry none.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.atomic_file import write_atomically
from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

PAUSE_FILE = "pause.json"
MAX_FILE_BYTES = 4096
MAX_PAUSE_S = 30 * 86_400.0
"""No longer pause is believed: the machine's clock may have been set meanwhile."""

OWNER_PAUSED = Finding("its owner paused it")


@dataclass(frozen=True, kw_only=True)
class WantedPause:
    """What the owner wants: a pause until `until_s`, seconds since 1970, or until `resume` if that is None."""

    until_s: float | None


def write_pause(folder: Path, pause: WantedPause) -> None:
    """Keep it in a host's folder; raises OSError."""
    write_atomically(folder / PAUSE_FILE, f"{json.dumps({'until_s': pause.until_s})}\n".encode())


def read_pause(folder: Path, now_s: float) -> WantedPause | None:
    """The pause that is kept in a folder; None if there is none, if it is over or, with a warning, damaged."""
    path = folder / PAUSE_FILE
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read, so no pause is kept: %s", path, error)
        return None
    until_s = told.get("until_s") if isinstance(told, dict) else math.nan
    if until_s is None:
        return WantedPause(until_s=None)
    if type(until_s) not in {int, float} or not until_s <= now_s + MAX_PAUSE_S:
        logger.warning("%s: until_s must be a moment within 30 days, so no pause is kept", path)
        return None
    return WantedPause(until_s=float(until_s)) if until_s > now_s else None


class OwnerPause:
    """The pause of the host whose folder this is. Belongs to the event loop, and touches the disk at a signal alone."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self._wanted = read_pause(folder, clock())
        if self._wanted is not None:
            logger.info("This host was paused by its owner, and still is: `resume` ends that")

    @property
    def until_s(self) -> float | None:
        """When the pause ends by itself, in seconds since 1970; None if there is no such moment, or no pause."""
        return self._wanted.until_s if self._wanted is not None else None

    def begin(self) -> None:
        """Pause, as the file says; without one, until `resume`."""
        self._wanted = read_pause(self._folder, self._clock()) or WantedPause(until_s=None)
        try:
            write_pause(self._folder, self._wanted)
        except OSError as error:
            logger.warning("%s cannot be written, so a restart ends this pause: %s", PAUSE_FILE, error.strerror)

    def end(self) -> None:
        """Work again."""
        self._wanted = None
        try:
            (self._folder / PAUSE_FILE).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be deleted: delete it, or a restart pauses again: %s", PAUSE_FILE, error.strerror)

    def look(self) -> Finding:
        """Whether it holds now."""
        if self.until_s is not None and self._clock() >= self.until_s:
            self._wanted = None
        return OWNER_PAUSED if self._wanted is not None else Finding()
