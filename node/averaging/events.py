"""What averaging tells in the event log of a host or a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class ExchangeEvent(Event):
    """An exchange of replicas has ended. `problem` says why it ended early, and is empty otherwise.

    `dialled` says whether this node began it; `blocks` counts those that have moved, `clipped` rows, `refused` blocks.
    """

    event: ClassVar[str] = "exchange"

    partner: str
    dialled: bool
    blocks: int
    divergence_max: float
    divergence_mean: float
    clipped: int
    refused: int
    bytes: int
    seconds: float
    problem: str


@dataclass(frozen=True, kw_only=True)
class DownloadEvent(Event):
    """A download that takes its time: so many bytes of a block are here, and when the rest will be at this rate."""

    event: ClassVar[str] = "download"

    block: str
    bytes: int
    of_bytes: int
    bytes_per_s: int
    seconds_left: float
