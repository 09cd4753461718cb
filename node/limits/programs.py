"""Whether programs run beside which a host must not work, such as a game, by the names of their processes."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import psutil

from node.limits.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

FIRST_PID = 1
MAX_PROCESSES = 8192
"""A look reads one file for each process, and no more than so many of them."""


class Process(Protocol):
    """What is asked of psutil's processes."""

    @property
    def pid(self) -> int:
        """Its number."""

    def name(self) -> str:
        """The name of the program, without its folder."""

    def status(self) -> str:
        """What it does, in psutil's words."""

    def parents(self) -> Sequence[Process]:
        """The processes that it descends from, the nearest first."""


class Programs:
    """Looks for programs by name, in capitals or not. This process and those that descend from it do not count."""

    def __init__(
        self,
        names: Iterable[str],
        processes: Callable[[], Iterable[Process]] = psutil.process_iter,
        own_pid: int | None = None,
    ) -> None:
        self._names = {name.casefold(): name for name in names}
        self._processes, self._own_pid = processes, own_pid or os.getpid()

    def look(self) -> Finding:
        """Look through the processes of this machine, or of this container: those outside are not to be seen."""
        found, pids = set[str](), set[int]()
        for process in islice(self._processes(), MAX_PROCESSES):
            pids.add(process.pid)
            name = self._name_if_wanted(process)
            if name:
                found.add(name)
        return Finding(_sentence(sorted(found)), self._unseen(pids))

    def _name_if_wanted(self, process: Process) -> str:
        """The name as the owner wrote it, if that program runs; "" for others, and for those that have ended."""
        with suppress(psutil.Error):
            name = self._names.get(process.name().casefold(), "")
            if name and process.status() != psutil.STATUS_ZOMBIE and not self._is_own(process):
                return name
        return ""

    def _is_own(self, process: Process) -> bool:
        return self._own_pid in {process.pid, *(parent.pid for parent in process.parents())}

    def _unseen(self, pids: set[int]) -> str:
        if len(pids) >= MAX_PROCESSES:
            return f"this machine runs {MAX_PROCESSES:,} programs or more: the others are not looked at for not_while"
        if FIRST_PID not in pids:
            return "this machine hides the processes of other users: only those of this user count for not_while"
        return ""


def _sentence(names: list[str]) -> str:
    if not names:
        return ""
    return f"{' and '.join(names)} {'runs' if len(names) == 1 else 'run'}"
