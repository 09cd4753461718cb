"""The trunk in the swarm: a trainer's server, how it joins the run's other trunks, what it announces of its own."""

from __future__ import annotations

import asyncio
import logging
import random
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from common.errors import UnavailableError
from node.averaging import service as averaging_service
from node.averaging.joining import JoinConfig, fetch_replica
from node.averaging.node_averaging import Averaging, AveragingOptions
from node.averaging.partial import PartialDownloads
from node.averaging.progress import DownloadProgress
from node.membership import reachability
from node.membership.reachability import DialBackService
from node.model.learning_rate import averaged_rate_scale
from node.rpc.server import NodeServer
from node.trainer.events import TrunkJoinedEvent, WaitingEvent
from node.trainer.trunk_replica import TrunkReplica
from protocol.announcements import MAX_DIVERGENCE, BlockRecord
from protocol.manifest import TRUNK

if TYPE_CHECKING:
    from collections.abc import Mapping

    import grpc

    from common.events import EventLog
    from dht.view import Replica
    from node.membership.swarm import Swarm
    from node.trainer.config import TrainConfig
    from node.trainer.train_step import Training

logger = logging.getLogger(__name__)

TRY_AGAIN_S = 1.0
DRAIN_GRACE_S = 0.2


class TrainerEndpoint(Protocol):
    """Where others call this trainer."""

    @property
    def endpoint(self) -> str:
        """What it announces."""

    async def settle(self, endpoint: str) -> None:
        """Find that out, `endpoint` being host:port of its server."""

    async def close(self) -> None:
        """Let go of what was opened for it; safe to call twice."""


class TrunkSharing:
    """Keeps one trainer's trunk in sync with the others'. Belongs to the event loop."""

    def __init__(
        self,
        config: TrainConfig,
        swarm: Swarm,
        training: Training,
        events: EventLog,
        node_endpoint: TrainerEndpoint,
        services: Mapping[str, grpc.GenericRpcHandler] = MappingProxyType({}),
    ) -> None:
        """`services` by name: what else this trainer's server answers."""
        self._config, self._swarm, self._training, self._events = config, swarm, training, events
        self._peer_id = swarm.identity.peer_id
        self._random = random.Random(config.seed)
        self.replica = TrunkReplica(training)
        options = AveragingOptions(seed=config.seed)
        self.averaging = Averaging(swarm.manifest, swarm.security, swarm.directory, events, options)
        own = {
            averaging_service.SERVICE_NAME: self.averaging.service.handler(),
            reachability.SERVICE_NAME: DialBackService(swarm.security.caller(), swarm.listen).handler(),
        }
        self._server = NodeServer(
            (*own.values(), *services.values()),
            (*own, *services),
            swarm.listen,
            config.port,
            swarm.security,
        )
        self._node_endpoint = node_endpoint
        self._partials = PartialDownloads(DownloadProgress(events).tell)

    @property
    def server_endpoint(self) -> str:
        """host:port of the server, once started."""
        return self._server.endpoint

    async def join(self) -> None:
        """Take over the trunk of a run that already trains, then answer other trainers.

        Raises UnavailableError if another trainer is announced but its trunk cannot be had within the join timeout.
        """
        await self._fetch_trunk()
        self.averaging.replicas.add(self.replica)
        await self._server.start()
        await self._node_endpoint.settle(self._server.endpoint)

    async def catch_up(self) -> None:
        """One exchange at once, when this trunk is announced: what others learnt during the download. Then gossip."""
        await self.averaging.averager.exchange_once()
        self.averaging.start()

    async def stop(self) -> None:
        """End exchanges and the server; safe before `join` and twice."""
        await self.averaging.stop()
        await self._node_endpoint.close()
        await self._server.drain(DRAIN_GRACE_S)

    def rate_scale(self) -> float:
        """Factor of the trunk's learning rate, for the trainers that it is averaged with."""
        works = self.averaging.averager.works(TRUNK, self.replica.version)
        return averaged_rate_scale(works, self._swarm.manifest.averaging.max_rate_scale)

    def record(self) -> BlockRecord:
        """What this trainer announces of its trunk."""
        return BlockRecord(
            block=TRUNK,
            version=self.replica.version,
            endpoint=self._node_endpoint.endpoint,
            tokens_total=self._training.own_tokens,
            divergence=min(self.averaging.averager.divergence(TRUNK), MAX_DIVERGENCE),
        )

    async def _fetch_trunk(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.join_timeout_s
        while newer := self._newer_trunks():
            try:
                await self._download(newer)
            except UnavailableError as error:
                left_s = deadline - loop.time()
                if left_s <= 0:
                    self._give_up(len(newer), error)
                    return
                # A trainer that crashed a moment ago is still listed; its record expires.
                self._events.emit(WaitingEvent(for_=f"the trunk from another trainer ({error})"))
                await self._swarm.directory.wait_for_change(min(left_s, TRY_AGAIN_S))
            else:
                return

    async def _download(self, candidates: tuple[Replica, ...]) -> None:
        config = JoinConfig(max_distance=self._swarm.manifest.averaging.clip_radius)
        wanted = self.replica.schema()
        state = await fetch_replica(self.averaging.client, candidates, wanted, config, self._random, self._partials)
        await asyncio.wrap_future(self.replica.load_state(state))
        self._events.emit(TrunkJoinedEvent(version=state.version, trainers=len(candidates)))
        logger.info("Took over the trunk of the run at version %d", state.version)

    def _give_up(self, n_trainers: int, error: UnavailableError) -> None:
        """Go on with a trunk that was trained, if only a little; never with a fresh one."""
        if not self._training.own_tokens:
            raise UnavailableError(
                f"the trunk of this run could not be downloaded from its {n_trainers} other trainers ({error}), and a "
                "fresh one would set them back: see that they can be reached from here, or stop them and try again"
            ) from error
        logger.warning("No newer trunk could be downloaded (%s); going on with the one from the checkpoint", error)

    def _newer_trunks(self) -> tuple[Replica, ...]:
        """Other trainers' trunks that are ahead of this one; all of them for a trunk that was never trained."""
        trunks = self._swarm.directory.snapshot(with_avoided=True).trunk
        version = self._training.version
        return tuple(
            r for r in trunks if r.peer_id != self._peer_id and (r.version > version or not self._training.own_tokens)
        )
