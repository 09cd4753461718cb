"""What a coordinator, a lighthouse and a local swarm tell in their event logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.events import Event


@dataclass(frozen=True, kw_only=True)
class PeerStartEvent(Event):
    """A coordinator or a lighthouse is up: a first peer of the run, at these addresses."""

    event: ClassVar[str] = "start"

    run_id: str
    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PeerLeaveEvent(Event):
    """A coordinator or a lighthouse ends."""

    event: ClassVar[str] = "leave"


@dataclass(frozen=True, kw_only=True)
class SnapshotEvent(Event):
    """A snapshot is whole, `seconds` after it was begun. `deleted` names the older ones that went for it."""

    event: ClassVar[str] = "snapshot"

    folder: str
    bytes: int
    seconds: float
    deleted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SnapshotFailedEvent(Event):
    """A snapshot could not be taken; older ones stay, and the next one is tried at its time."""

    event: ClassVar[str] = "snapshot_failed"

    reason: str


@dataclass(frozen=True, kw_only=True)
class CreditEvent(Event):
    """A coordinator has collected receipts: `new` ones, of those that hold, from the peers that have `answered`."""

    event: ClassVar[str] = "credit"

    asked: int
    answered: int
    new: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class LocalStartEvent(Event):
    """Every process of a local swarm was started."""

    event: ClassVar[str] = "start"

    run_id: str
    hosts: int


@dataclass(frozen=True, kw_only=True)
class ChildEndedEvent(Event):
    """A host, the coordinator or a trainer other than the first died."""

    event: ClassVar[str] = "ended"

    name: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class LocalEndEvent(Event):
    """A local swarm has ended. `dead` has the exit codes of those that died before, `killed` who had to be killed."""

    event: ClassVar[str] = "end"

    dead: dict[str, int]
    killed: tuple[str, ...]
