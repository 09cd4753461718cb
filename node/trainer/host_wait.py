"""Waiting for hosts: a trainer for every block at the start and for enough experts at a step, `sample` at a token."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from common.errors import TooFewExpertsError, UnavailableError
from common.tasks import until_stopped
from node.trainer.events import RetryEvent, WaitingEvent
from node.trainer.swarm_client import wait_for_blocks
from protocol.manifest import all_blocks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    import torch

    from common.events import EventLog
    from node.membership.swarm import Swarm
    from node.trainer.dispatch.dispatcher import Dispatcher
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

WAIT_FOR_CHANGE_S = 1.0

A = TypeVar("A")
R = TypeVar("R")


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


class LiveExperts(Protocol):
    """What a dispatcher says of the experts of a run."""

    manifest: Manifest

    def live_experts(self, layer: int) -> torch.Tensor:
        """`live_E` (bool): experts that can be called now."""

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when they change, at the latest after `timeout_s`; raises DrainingError when leaving."""


class PatientWait:
    """Repeats what too few experts answered until enough do, for at most `timeout_s` seconds on end."""

    def __init__(self, experts: LiveExperts, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._experts, self._timeout_s, self._clock = experts, timeout_s, clock

    def until_enough(self, function: Callable[[A], R], item: A) -> R:
        """`function(item)`, again and again while too few experts answer. Called on a compute thread.

        Raises:
            TooFewExpertsError: the time is over; says how many experts are missing and what to do.
            DrainingError: the node is leaving.
        """
        deadline: float | None = None
        is_told = False
        while True:
            try:
                return function(item)
            except TooFewExpertsError as error:
                now = self._clock()
                deadline = now + self._timeout_s if deadline is None else deadline
                if now >= deadline:
                    raise TooFewExpertsError(self._given_up(error), error.failed_peers) from None
                # Peers that failed are avoided from now on: the gate chooses among the others at once.
                if not error.failed_peers:
                    if not is_told:
                        logger.info("Waiting for hosts, %.0f s at most: %s", deadline - now, error)
                    is_told = True
                    self._experts.wait_for_change(min(WAIT_FOR_CHANGE_S, deadline - now))

    def _given_up(self, error: TooFewExpertsError) -> str:
        model = self._experts.manifest.model
        n_experts = model.n_layers * model.experts_per_layer
        n_live = sum(int(self._experts.live_experts(layer).sum()) for layer in range(model.n_layers))
        return (
            f"{n_experts - n_live:,} of {n_experts:,} experts have no host that answers, after a wait of "
            f"{self._timeout_s:g} s ({error}): start hosts for this run, look at it with `status`, and try again"
        )
