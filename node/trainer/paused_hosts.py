"""Tells which hosts of the run are paused, as they say themselves, for the panel and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.tasks import repeat
from dht.directory import REFRESH_S
from node.trainer.events import PausedHost, PausedHostsEvent

if TYPE_CHECKING:
    from common.events import EventLog
    from dht.directory import Directory

MAX_TOLD = 32


class PausedHosts:
    """Tells which hosts are paused. It belongs to the event loop, and reads the directory from memory."""

    def __init__(self, directory: Directory, events: EventLog) -> None:
        self._directory, self._events = directory, events
        self._told = PausedHostsEvent(hosts=(), total=0)

    async def watch(self) -> None:
        """Look as often as the directory does, until cancelled."""
        await repeat(self._tell, lambda: REFRESH_S)

    async def _tell(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Emit the event if something has changed since the last one."""
        paused = [peer for peer in self._directory.peers() if peer.role == "host" and peer.paused]
        hosts = tuple(
            PausedHost(
                peer_id=peer.peer_id,
                cause=peer.pause_cause,
                since_s=peer.paused_since_s,
                until_s=peer.paused_until_s,
            )
            for peer in paused[:MAX_TOLD]
        )
        event = PausedHostsEvent(hosts=hosts, total=len(paused))
        if event != self._told:
            self._told = event
            self._events.emit(event)
