"""A trainer that waits for hosts: for every block at the start, and for enough experts at a step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from common.errors import UnavailableError
from common.tasks import until_stopped
from node.trainer.events import RetryEvent, WaitingEvent
from node.trainer.swarm_client import wait_for_blocks
from protocol.manifest import all_blocks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from common.errors import TooFewExpertsError
    from common.events import EventLog
    from node.membership.swarm import Swarm
    from node.trainer.dispatch.dispatcher import Dispatcher

WAIT_FOR_CHANGE_S = 1.0


class HostWait:
    """`steps_done` says how many steps the trainer has taken."""

    def __init__(self, swarm: Swarm, dispatcher: Dispatcher, steps_done: Callable[[], int], events: EventLog) -> None:
        self._swarm, self._dispatcher, self._steps_done, self._events = swarm, dispatcher, steps_done, events

    async def for_all_blocks(self, timeout_s: float, stop: asyncio.Event) -> None:
        """Give every block the time to find a host; then begin with those that did."""
        directory = self._swarm.directory
        if directory.snapshot().lost_blocks():
            self._emit_waiting("")
            with contextlib.suppress(UnavailableError):
                await until_stopped(wait_for_blocks(directory, timeout_s), stop)

    def _emit_waiting(self, why: str) -> None:
        lost = len(self._swarm.directory.snapshot().lost_blocks())
        total = len(all_blocks(self._swarm.manifest.model))
        self._events.emit(WaitingEvent(for_=f"hosts: {lost} of {total} blocks have no live replica{why}"))

    def for_experts(self, error: TooFewExpertsError) -> None:
        """Called on a compute thread; returns when it is worth trying again, raises DrainingError when leaving."""
        if error.failed_peers:
            # They are avoided from now on: the gate chooses among the others at once.
            self._events.emit(RetryEvent(step=self._steps_done() + 1, reason=str(error)))
            return
        self._emit_waiting(f" ({error})")
        self._dispatcher.wait_for_change(WAIT_FOR_CHANGE_S)
