"""What a host tells in its event log. `pause`, `resume` and `leave` read some of it from another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event
from node.limits.memory import Capacity


@dataclass(frozen=True, kw_only=True)
class LimitsEvent(Event):
    """The limits that are set, what fits under them, and the memory that is in use before the first block."""

    event: ClassVar[str] = "limits"

    limits: dict[str, object]
    room: Capacity
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class FewerBlocksEvent(Event):
    """There was no memory for more than `max_blocks` blocks."""

    event: ClassVar[str] = "fewer_blocks"

    max_blocks: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class AskedEvent(Event):
    """The owner's signal was heard: `word` is pause, resume or leave. `paused` says whether the host was so already.

    `until_s`: when the owner's pause ends by itself, in seconds since 1970; None without such a moment.
    """

    event: ClassVar[str] = "asked"

    word: str
    paused: bool
    reasons: tuple[str, ...]
    until_s: float | None


@dataclass(frozen=True, kw_only=True)
class PausedEvent(Event):
    """Nothing is served from now on; so many blocks are stored."""

    event: ClassVar[str] = "paused"

    reasons: tuple[str, ...]
    stored: int


@dataclass(frozen=True, kw_only=True)
class ResumedEvent(Event):
    """The host works again, and serves this many blocks."""

    event: ClassVar[str] = "resumed"

    blocks: int


@dataclass(frozen=True, kw_only=True)
class LeavingEvent(Event):
    """The host is about to hand over this many blocks."""

    event: ClassVar[str] = "leaving"

    blocks: int


@dataclass(frozen=True, kw_only=True)
class HandedOverEvent(Event):
    """Others serve so many of the blocks now, and nobody serves those in `left`."""

    event: ClassVar[str] = "handed_over"

    blocks: int
    left: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JoinedEvent(Event):
    """A block was downloaded from live replicas, or from another host's checkpoint."""

    event: ClassVar[str] = "joined"

    block: str
    version: int
    source: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class JoinFailedEvent(Event):
    """A block could not be downloaded; the host looks at it again later."""

    event: ClassVar[str] = "join_failed"

    block: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PlacementEvent(Event):
    """This host is about to take some blocks and to give some up."""

    event: ClassVar[str] = "placement"

    take: tuple[str, ...]
    drop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnnouncedEvent(Event):
    """The host serves its first blocks, with these versions, and others can know it."""

    event: ClassVar[str] = "announced"

    run_id: str
    peer_id: str
    endpoint: str
    addresses: tuple[str, ...]
    versions: dict[str, int]
    device: str
    seconds_since_start: float


@dataclass(frozen=True, kw_only=True)
class LoadEvent(Event):
    """What the host does and uses, told periodically."""

    event: ClassVar[str] = "load"

    tokens_per_s: float
    tokens_total: int
    queue_tokens: int
    kept_inputs_bytes: int
    refused: int
    staleness: float
    steps_refused: int
    exchanged_bytes: int
    sent_bytes: int
    received_bytes: int
    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class TakenInEvent(Event):
    """An offered expert was taken in. `tested` is the version of the block that it was tested against."""

    event: ClassVar[str] = "taken_in"

    layer: int
    expert: int
    version: int
    tested: int


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """The blocks that had changed were written."""

    event: ClassVar[str] = "checkpoint"

    blocks: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlockCheckpointFailedEvent(Event):
    """A block could not be written; the host goes on, and the old checkpoint stays."""

    event: ClassVar[str] = "checkpoint_failed"

    reason: str


@dataclass(frozen=True, kw_only=True)
class HostLeaveEvent(Event):
    """The host withdraws its records and ends."""

    event: ClassVar[str] = "leave"
