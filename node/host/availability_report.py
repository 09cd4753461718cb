"""Tells why a host does not work, and since when: its event log, and the file that `health` reads."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from node.limits.availability_file import AVAILABILITY_FILE, write_availability
from node.limits.events import AvailabilityEvent

if TYPE_CHECKING:
    from pathlib import Path

    from common.events import EventLog
    from node.host.availability import Availability

logger = logging.getLogger(__name__)


class AvailabilityReport:
    """Tells it of the host whose folder this is, at first and whenever it changes. Belongs to the event loop."""

    def __init__(self, availability: Availability, folder: Path, events: EventLog) -> None:
        self._availability, self._folder, self._events = availability, folder, events
        self._could_write = True

    async def follow(self) -> None:
        """Tell, until cancelled; the file goes then."""
        availability = self._availability
        try:
            while True:
                availability.changed.clear()
                event = AvailabilityEvent(reasons=availability.held, unknown=availability.unknown)
                self._events.emit(event)
                await asyncio.to_thread(self._write, event)
                await availability.changed.wait()
        finally:
            (self._folder / AVAILABILITY_FILE).unlink(missing_ok=True)

    def _write(self, event: AvailabilityEvent) -> None:
        try:
            write_availability(self._folder, event)
        except OSError as error:
            if self._could_write:
                logger.warning("%s cannot be written, so `health` shows no reasons: %s", AVAILABILITY_FILE, error)
            self._could_write = False
        else:
            self._could_write = True
