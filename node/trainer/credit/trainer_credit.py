"""Credit on a trainer: once a minute it claims what hosts have answered, and has them sign for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING

from common.errors import StorageError
from common.seldom import Seldom
from common.tasks import repeat
from node.credit.service import CreditService
from node.credit.store import ReceiptStore
from node.trainer.credit.claims import CLAIM_S, SCHEMA, Claims
from node.trainer.credit.sender import ClaimSender
from protocol.endpoints import Address
from protocol.profile import chosen_profile

if TYPE_CHECKING:
    import grpc

    from node.membership.swarm import Swarm
    from node.trainer.config import TrainConfig
    from node.trainer.dispatch.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

SHORTEST_S = 0.75 * CLAIM_S
"""The least time between two rounds; trainers that were started together do not call together for long."""

SEND_S = 30.0
"""The longest that a round may take for its calls; the rest waits for the next one."""


class TrainerCredit:
    """One trainer's. Belongs to the event loop; a disk that fails costs credit and not the training."""

    def __init__(self, config: TrainConfig, swarm: Swarm, dispatcher: Dispatcher) -> None:
        run_id, identity = swarm.manifest.run_id, swarm.identity
        self._swarm = swarm
        self._store = ReceiptStore(config.out, run_id, SCHEMA)
        self._claims = Claims(identity, run_id, self._store, dispatcher.answered.taker(), swarm.dht.now_s)
        self._sender = ClaimSender(run_id, self._claims, dispatcher.client.channels, self._addresses)
        profile = chosen_profile(config.name, config.team, time.time())
        self._service = CreditService(run_id, self._store, identity, profile)
        self._random = random.Random(identity.peer_id)
        self._told = Seldom()

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
        return self._service.handler()

    async def open(self) -> None:
        """Open the store, before the server answers."""
        try:
            await asyncio.to_thread(self._store.open)
        except StorageError as error:
            self._warn(error)

    async def keep(self) -> None:
        """Claim and send, about once a minute, until cancelled."""
        await repeat(lambda: self._round(SEND_S), lambda: self._random.uniform(SHORTEST_S, CLAIM_S))

    async def finish(self, timeout_s: float) -> None:
        """Claim what was answered last, try to have it signed within `timeout_s`, and close the store.

        What is not signed waits on the disk for the next start. Safe after `open` failed.
        """
        await self._round(timeout_s)
        await asyncio.to_thread(self._store.close)

    async def _round(self, timeout_s: float) -> None:
        if self._swarm.security.insecure_local:  # hosts do not know whose calls they answer
            return
        try:
            await asyncio.to_thread(self._claims.make)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._sender.send()
        except StorageError as error:
            self._warn(error)

    def _addresses(self) -> dict[str, Address]:
        peers = self._swarm.directory.peers()
        return {p.peer_id: Address(p.peer_id, p.endpoint) for p in peers if p.role == "host" and p.endpoint}

    def _warn(self, error: StorageError) -> None:
        if self._told.due("storage"):
            logger.warning("What hosts answer earns them nothing now: %s", error)
