"""What processes weigh, compute and send: PSS and processor time from the kernel, TCP bytes from `ss` (iproute2)."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

SS = ("ss", "-tinpHO")
SS_TIMEOUT_S = 10.0

_SENT = re.compile(r"\bbytes_sent:(\d+)")
_PID = re.compile(r"\bpid=(\d+)")


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def pss_bytes(pid: int) -> int:
    """Of a process tree: memory of its own, and its share of what others map too."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor time of these processes so far, user and system, all threads; those below them are not counted."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def bytes_sent(lines: Iterable[str], pids: Collection[int]) -> dict[tuple[str, str], int]:
    """Payload that each TCP socket of these processes has sent, by its two ends, from what `ss -tinpHO` printed."""
    sent: dict[tuple[str, str], int] = {}
    for line in lines:
        if any(int(pid) in pids for pid in _PID.findall(line)):
            _, _, _, local, remote, *_ = line.split()
            found = _SENT.search(line)
            sent[local, remote] = int(found[1]) if found else 0
    return sent


class SocketMeter:
    """Adds up what some process trees send over TCP. A connection that opens and closes between two reads is missed."""

    def __init__(self, pids: Collection[int]) -> None:
        if shutil.which(SS[0]) is None:
            raise SystemExit("this benchmark counts bytes with ss, which is not installed; it is in iproute2")
        self._roots = tuple(pids)
        self._sent: dict[tuple[str, str], int] = {}
        self._total = 0

    def read(self) -> int:
        """Bytes sent by all of them since the first sockets were made, as far as they have been seen."""
        pids = {process.pid for root in self._roots for process in tree(root)}
        done = subprocess.run(SS, capture_output=True, text=True, timeout=SS_TIMEOUT_S, check=True)
        now = bytes_sent(done.stdout.splitlines(), pids)
        self._total += grown(self._sent, now)
        self._sent = now
        return self._total


def grown(before: Mapping[tuple[str, str], int], now: Mapping[tuple[str, str], int]) -> int:
    """Bytes sent between two looks; a count that fell belongs to a new connection between the same two ends."""
    return sum(sent - (old if (old := before.get(ends, 0)) <= sent else 0) for ends, sent in now.items())
