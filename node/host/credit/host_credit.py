"""Credit on a host: its accounts and its receipts, opened and closed with it, and the service that speaks for them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from common.errors import StorageError
from common.seldom import Seldom
from common.tasks import repeat
from node.credit.service import CreditService
from node.credit.store import MAX_RECEIPTS, ReceiptStore
from node.host.credit.accounts import SCHEMA, TrainerAccounts
from protocol.profile import chosen_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from node.credit.answered import AnsweredPairs
    from node.host.config import HostConfig
    from node.limits.limits import Limits
    from node.membership.swarm import Swarm

logger = logging.getLogger(__name__)

SAVE_S = 5.0
"""What a host that is killed forgets of its counts at most; its trainers then claim that much less."""

FORGET_S = 3600.0
DISK_SHARE, ROW_BYTES = 0.05, 512
"""The share of an owner's limit of the disk for receipts, and what one takes there."""


class HostCredit:
    """One host's. Belongs to the event loop; a disk that fails costs credit and not the host."""

    def __init__(self, config: HostConfig, limits: Limits, swarm: Swarm, answered: AnsweredPairs) -> None:
        run_id, identity = swarm.manifest.run_id, swarm.identity
        self._store = ReceiptStore(config.state, run_id, SCHEMA, receipts_kept(limits))
        self.accounts = TrainerAccounts(identity, run_id, self._store, answered.taker(), swarm.dht.now_s)
        profile = chosen_profile(config.name, config.team, time.time())
        self._service = CreditService(run_id, self._store, identity, profile, self.accounts)
        self._told = Seldom()

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        return self._service.handler()

    async def open(self) -> None:
        """Open the store, before the server answers."""
        await self._or_warn(self._store.open)

    async def keep(self) -> None:
        """Save counts and forget what is old, again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            saving = repeat(lambda: self._or_warn(self.accounts.save), lambda: SAVE_S)
            forgetting = repeat(lambda: self._or_warn(self.accounts.forget_old), lambda: FORGET_S, at_once=True)
            group.create_task(saving, name="save counts")
            group.create_task(forgetting, name="forget receipts")

    async def close(self) -> None:
        """Save what was counted and close the store; safe to call twice, and after `open` failed."""
        await self._or_warn(self.accounts.save)
        await asyncio.to_thread(self._store.close)

    async def _or_warn(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(work)
        except StorageError as error:
            if self._told.due("storage"):
                logger.warning("What this host answers is not counted now: %s", error)


def receipts_kept(limits: Limits) -> int:
    """How many receipts a host keeps under its owner's limits."""
    if limits.disk_bytes is None:
        return MAX_RECEIPTS
    return min(MAX_RECEIPTS, int(limits.disk_bytes * DISK_SHARE) // ROW_BYTES)
