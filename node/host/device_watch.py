"""Watches whether a host's device still computes: one on which every batch fails serves nobody.

A driver that was updated, a GPU that fell off the bus or was taken by another program fail batch after batch; callers
go elsewhere, and the host would stay announced and call itself healthy. A batch that fails is no proof, since a peer
sent it: the device is tried with a block and a token of the host's own.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from common.backoff import backoff_s
from common.errors import NoRoomError
from common.tasks import repeat
from node.host.availability import Reason
from node.host.serving.batch_runner import try_forward
from node.model.devices import first_line
from node.model.experts.block import new_block
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import torch

    from node.host.availability import Availability
    from node.host.serving.runtime import Runtime
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

LOOK_S = 1.0
MAX_FAILED_BATCHES = 5
"""The device is tried when so many batches in a row have failed."""

TRY_AGAIN_S = 60.0
MAX_DOUBLINGS = 6


class DeviceWatch:
    """`try_device` says what goes wrong now, on the thread that owns the device, and `report` hears it; "" is well."""

    def __init__(
        self,
        runtime: Runtime,
        availability: Availability,
        try_device: Callable[[], str],
        report: Callable[[str], Awaitable[None]],
    ) -> None:
        self._runtime, self._availability, self._report = runtime, availability, report
        self._try_device = try_device
        self._tries = 0

    async def watch(self) -> None:
        """Look again and again, until cancelled; while it fails, after pauses that grow to an hour."""
        await repeat(self.look, self.pause_s)

    async def look(self) -> None:
        """Try the device if there is reason to; the host pauses when it fails, and works again when it does not."""
        if not self._tries and self._runtime.failed_in_a_row < MAX_FAILED_BATCHES:
            return
        problem = await asyncio.wrap_future(self._runtime.call(self._try_device))
        if problem and not self._tries:
            logger.error("The device fails at every batch (%s): this host gives its blocks up until it works", problem)
        elif self._tries and not problem:
            logger.info("The device computes again")
        self._tries = self._tries + 1 if problem else 0
        await self._report(problem)
        self._availability.tell(Reason.DEVICE, holds=bool(problem))

    def pause_s(self) -> float:
        """Seconds until the next look."""
        return backoff_s(TRY_AGAIN_S, self._tries - 1, max_doublings=MAX_DOUBLINGS) if self._tries else LOOK_S


def device_problem(manifest: Manifest, device: torch.device) -> str:
    """What goes wrong when a new block of the run computes a token on `device`; empty if nothing does."""
    try:
        block = new_block(manifest, BlockId(0, 0), device)
    except (RuntimeError, NoRoomError) as error:
        return first_line(error)
    return try_forward(block, manifest.model.d_model, device)
