"""Composition root of a host: its parts are built and wired here, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from functools import partial
from typing import TYPE_CHECKING

from common.clock import clock_with_sleep
from common.errors import DrainingError
from common.metrics import serve_metrics
from common.tasks import beside, until_stopped
from dht.announcer import Announcer
from node.averaging import service as averaging_service
from node.averaging.node_averaging import Averaging, AveragingOptions
from node.host.announcement import HostAnnouncement
from node.host.availability import Availability
from node.host.availability_monitor import AvailabilityMonitor
from node.host.availability_report import AvailabilityReport
from node.host.block_loader import BlockLoader
from node.host.block_manager import BlockManager
from node.host.block_store import BlockStore
from node.host.capacity import RoomPlan, runtime_config
from node.host.checkpoints import Checkpoints
from node.host.conditions import conditions_of
from node.host.credit.host_credit import HostCredit
from node.host.device_watch import DeviceWatch, problem_of
from node.host.events import AnnouncedEvent, AskedEvent, HostLeaveEvent, LimitsEvent
from node.host.expert_upload_service import ExpertUploadService, VerdictChecker
from node.host.hand_over import HandOver
from node.host.held_blocks import HeldBlocks
from node.host.live_limits import LimitedParts, LiveLimits
from node.host.load_events import LoadEvents
from node.host.memory_watch import MemoryWatch, watch_device_memory
from node.host.metrics import HostCollector
from node.host.owner_pause import OwnerPause
from node.host.owner_socket import owner_told
from node.host.owner_words import log_announced
from node.host.pause import Pause
from node.host.placement import PlacementConfig, parse_blocks
from node.host.placement_controller import PlacementController
from node.host.placement_planner import PlacementPlanner
from node.host.serving.runtime import Runtime
from node.host.serving.service import SERVICE_NAME, ExpertService
from node.host.signals import signals_heard
from node.host.status import HostStatus
from node.limits.memory import container_limit, lowest_limit
from node.limits.process_usage import ProcessUse
from node.limits.rate_limits import RateLimits
from node.membership import reachability
from node.membership.endpoint import NodeEndpoint
from node.membership.reachability import DialBackService
from node.rpc.health import server_told
from node.rpc.rate_limit_interceptor import RateLimitInterceptor
from node.rpc.server import NodeServer
from node.rpc.upload import INTAKE
from protocol import expert_pb2 as pb
from protocol.endpoints import Address
from protocol.receipts import CREDIT_SERVICE
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    import torch

    from common.events import EventLog
    from common.log_tail import LogTail
    from node.host.conditions import Condition
    from node.host.owner_limits import OwnerLimits
    from node.limits.limits import Limits
    from node.limits.memory import Capacity
    from node.membership.swarm import Swarm
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

AUTO = "auto"
DRAIN_GRACE_S = 0.5
RUNTIME_STOP_S = 1.0


class Host:
    """The parts of a running host: what it may take, what it holds, how others reach it, when it works."""

    def __init__(
        self,
        owner_limits: OwnerLimits,
        swarm: Swarm,
        device: torch.device,
        events: EventLog,
        log: LogTail,
        started: float,
    ) -> None:
        self._config, self._limits = owner_limits.config, owner_limits.limits
        config, limits = self._config, self._limits
        self._swarm, self._device, self._events, self._started = swarm, device, events, started
        self._start_elapsed_s = clock_with_sleep() - (time.time() - started)
        self._use = ProcessUse(swarm.dht.daemon_pid)
        swarm.dht.on_restart(lambda: self._use.follow(swarm.dht.daemon_pid))
        self._rate_limits = RateLimits(limits, self._use)
        self._availability, self._owner = Availability(), OwnerPause(config.state)
        self._monitor = AvailabilityMonitor(self._availability, self._conditions(limits))
        self._room = self._build_room_plan()
        self._capacity = self._find_capacity()

        self._store = BlockStore(config.state, swarm.manifest, device)
        self._runtime = self._build_runtime()
        self._averaging = self._build_averaging()
        self._held = HeldBlocks(self._runtime, self._averaging, self._store, time.monotonic)
        self._node_endpoint = NodeEndpoint(swarm, events, config)
        rng = random.Random(swarm.identity.peer_id)
        self._loader = self._build_loader(rng)
        self._announcement = self._build_announcement()
        self._announcer = Announcer(swarm.dht, swarm.identity, swarm.admission, describe=self._announcement.describe)
        self._block_manager = self._build_block_manager()
        self._placement = self._build_placement(rng)

        self._memory = MemoryWatch(self._memory_limit, self._use, self._placement.give_up_one)
        self._service = self._build_service()
        self._credit = HostCredit(config, limits, swarm, self._service.answered)
        self._server = self._build_server()
        self._checkpoints = Checkpoints(self._runtime, self._store, self._held, limits.disk_bytes, events)
        self._pause = self._build_pause()
        self._live_limits = self._build_live_limits(owner_limits)
        self._status = self._build_status(owner_limits, log)

    def _build_room_plan(self) -> RoomPlan:
        n_blocks = len(self._fixed_blocks()) or self._config.max_blocks
        return RoomPlan(self._config, n_blocks, self._swarm.manifest, self._device, self._use.memory_bytes())

    def _find_capacity(self) -> Capacity:
        """What the limits leave of what was asked for; a warning says if that is less."""
        wanted, capacity = self._room.wanted, self._room.under(self._limits)
        if capacity.max_blocks < wanted.max_blocks:
            logger.warning(
                "Room for %d blocks, not for %d, under this host's limits", capacity.max_blocks, wanted.max_blocks
            )
        self._events.emit(LimitsEvent(limits=self._limits.told(), room=capacity, memory_bytes=self._room.idle_bytes))
        return capacity

    def _conditions(self, limits: Limits) -> Iterator[Condition]:
        return conditions_of(limits, self._owner, self._use, self._device)

    @property
    def _memory_limit(self) -> int | None:
        return lowest_limit(self._limits.memory_bytes, container_limit())

    def _fixed_blocks(self) -> list[BlockId]:
        config = self._config
        return [] if config.blocks == AUTO else parse_blocks(config.blocks, self._swarm.manifest.model)

    def _build_runtime(self) -> Runtime:
        config = runtime_config(self._config, self._capacity)
        return Runtime((), self._swarm.manifest, config, rest_s=self._rate_limits.rest_s)

    def _build_averaging(self) -> Averaging:
        swarm = self._swarm
        options = AveragingOptions(stored=self._store.state, rate_limits=self._rate_limits)
        return Averaging(swarm.manifest, swarm.security, swarm.directory, self._events, options)

    def _build_loader(self, rng: random.Random) -> BlockLoader:
        client, rate_limits = self._averaging.client, self._rate_limits
        return BlockLoader(
            self._swarm.manifest, self._device, self._store, client, rng, lambda: rate_limits.slows_downloads
        )

    def _build_announcement(self) -> HostAnnouncement:
        return HostAnnouncement(
            manifest=self._swarm.manifest,
            started=self._started,
            node_endpoint=self._node_endpoint,
            runtime=self._runtime,
            held=self._held,
            averager=self._averaging.averager,
            availability=self._availability,
            exchanged_bytes=self._exchanged_bytes,
        )

    def _build_block_manager(self) -> BlockManager:
        swarm = self._swarm
        peer_id = swarm.identity.peer_id
        return BlockManager(self._held, self._loader, swarm.directory, peer_id, self._announcer, self._events)

    def _build_placement(self, rng: random.Random) -> PlacementController:
        swarm, unreachable = self._swarm, self._averaging.averager.unreachable
        config = PlacementConfig(
            max_blocks=self._capacity.max_blocks,
            target_replicas=swarm.manifest.averaging.target_replicas,
            check_s=self._config.recheck_s,
            anew_after_s=self._config.anew_after_s if self._config.recheck_s else 0.0,
        )
        planner = PlacementPlanner(
            swarm.directory, unreachable, swarm.identity.peer_id, config, rng, self._fixed_blocks()
        )
        return PlacementController(planner, self._block_manager, self._availability.pausing, self._events)

    def _build_service(self) -> ExpertService:
        manifest = self._swarm.manifest
        about = pb.DescribeResponse(run_id=manifest.run_id, peer_id=self._swarm.identity.peer_id, software=SOFTWARE)
        return ExpertService(manifest, self._runtime, self._device, about)

    def _build_upload_service(self) -> ExpertUploadService:
        manifest = self._swarm.manifest
        checker = VerdictChecker(manifest.owner, self._swarm.directory.peers, self._started)
        return ExpertUploadService(manifest, self._runtime, checker, self._rate_limits, self._events)

    def _build_server(self) -> NodeServer:
        swarm = self._swarm
        handlers = {
            SERVICE_NAME: self._service.handler(),
            averaging_service.SERVICE_NAME: self._averaging.service.handler(),
            CREDIT_SERVICE: self._credit.handler(),
            INTAKE: self._build_upload_service().handler(),
            reachability.SERVICE_NAME: DialBackService(swarm.security.caller(), swarm.listen).handler(),
        }
        rate_limit = RateLimitInterceptor(
            self._rate_limits,
            lambda: self._availability.refusal() or self._memory.refusal(),
            self._capacity.max_calls,
        )
        return NodeServer(
            tuple(handlers.values()), tuple(handlers), swarm.listen, self._config.port, swarm.security, rate_limit
        )

    def _build_pause(self) -> Pause:
        averager = self._averaging.averager
        return Pause(self._availability, self._block_manager, self._placement, averager, self._runtime, self._events)

    def _build_live_limits(self, owner_limits: OwnerLimits) -> LiveLimits:
        parts = LimitedParts(
            rate_limits=self._rate_limits,
            memory=self._memory,
            runtime=self._runtime,
            placement=self._placement,
            monitor=self._monitor,
            capacity=self._room.under,
            conditions=self._conditions,
        )
        return LiveLimits(owner_limits, parts, self._capacity, self._events)

    def _build_status(self, owner_limits: OwnerLimits, log: LogTail) -> HostStatus:
        return HostStatus(
            peer_id=self._swarm.identity.peer_id,
            device=self._device,
            parts=self._announcement,
            service=self._service,
            use=self._use,
            memory=self._memory,
            rate_limits=self._rate_limits,
            owner_limits=owner_limits,
            live_limits=self._live_limits,
            log=log,
        )

    def _build_hand_over(self) -> HandOver:
        swarm, averager = self._swarm, self._averaging.averager
        return HandOver(self._block_manager, averager, swarm.directory, swarm.identity.peer_id, self._events)

    def _exchanged_bytes(self) -> int:
        return self._averaging.averager.exchanged_bytes + self._loader.downloaded_bytes

    async def serve(self, stop: asyncio.Event) -> None:
        """Start, take blocks, announce them, wait for `stop`, leave."""
        self._runtime.start()
        # To the end: a signal that nobody hears would kill the node before it has saved.
        told = owner_told(self._config.state, self._status.told, self._live_limits.change)
        with signals_heard(self._availability, self._owner, self._report_signal):
            try:
                await self._credit.open()
                await self._server.start()
                async with told:
                    await self._work(stop)
                    await self._leave()
            finally:
                await asyncio.gather(
                    self._announcer.stop(), self._averaging.stop(), self._node_endpoint.close(), self._server.drain(0)
                )
                await self._credit.close()
                await asyncio.to_thread(self._runtime.stop, RUNTIME_STOP_S)

    async def _work(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, or until the owner asks this host to leave and it has handed its blocks over."""
        config = self._config
        collector = HostCollector(self._runtime, self._service, self._availability, self._exchanged_bytes)
        metrics = serve_metrics(collector, self._swarm.listen, config.metrics_port)
        address = Address(self._swarm.identity.peer_id, self._server.endpoint)
        with (
            metrics,
            server_told(config.state, address, obeys=True, admission=self._swarm.admission),
            contextlib.suppress(DrainingError),
        ):
            await until_stopped(self._monitor.look(), stop)
            await until_stopped(self._node_endpoint.settle(self._server.endpoint), stop)
            await until_stopped(beside(self._take_first_blocks(), self._monitor.watch()), stop)
            self._averaging.start()
            self._report_announced()
            await self._run_until_left(stop)
            if not stop.is_set():
                await until_stopped(self._build_hand_over().run(), stop)

    async def _take_first_blocks(self) -> None:
        self._held.stored = await asyncio.to_thread(self._store.versions)
        # Others that start now are seen by their first announcement, and what they join by their second.
        await self._announcer.start()
        with contextlib.suppress(DrainingError):
            await until_stopped(self._placement.take_first(), self._availability.pausing)
        await self._block_manager.announce()

    async def _run_until_left(self, stop: asyncio.Event) -> None:
        """Keep everything going that goes on until `stop` is set or the owner asks this host to leave."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in self._background()]
            with contextlib.suppress(DrainingError):
                await until_stopped(self._availability.leave.wait(), stop)
            for task in tasks:
                task.cancel()

    def _background(self) -> list[Coroutine[None, None, None]]:
        try_device = partial(problem_of, self._swarm.manifest, self._device)
        load = LoadEvents(self._runtime, self._rate_limits, self._memory, self._exchanged_bytes, self._events)
        work = [
            self._checkpoints.save_every(self._config.checkpoint_every_s),
            self._credit.keep(),
            load.emit_forever(),
            self._memory.watch(),
            watch_device_memory(self._runtime, self._placement.give_up_one),
            self._node_endpoint.watch(self._announcer),
            self._monitor.watch(),
            self._pause.follow(),
            AvailabilityReport(self._availability, self._config.state, self._events).follow(),
            DeviceWatch(self._runtime, self._availability, try_device, self._server.report).watch(),
        ]
        return [*work, self._placement.recheck_forever()] if self._config.recheck_s else work

    async def _leave(self) -> None:
        """Withdraw the records while running calls end, then save what they changed."""
        self._events.emit(HostLeaveEvent())
        await asyncio.gather(self._announcer.withdraw(), self._averaging.stop(), self._server.drain(DRAIN_GRACE_S))
        await self._checkpoints.save()

    def _report_announced(self) -> None:
        blocks = self._runtime.blocks
        event = AnnouncedEvent(
            run_id=self._swarm.manifest.run_id,
            peer_id=self._swarm.identity.peer_id,
            endpoint=self._node_endpoint.endpoint,
            addresses=tuple(self._swarm.dht.addresses),
            versions={str(block_id): block.version for block_id, block in sorted(blocks.items())},
            device=str(self._device),
            seconds_since_start=round(clock_with_sleep() - self._start_elapsed_s, 2),
        )
        self._events.emit(event)
        log_announced(event, sum(len(block.experts) for block in blocks.values()), self._config, self._capacity)

    def _report_signal(self, word: str) -> None:
        availability, until_s = self._availability, self._owner.until_s
        event = AskedEvent(word=word, paused=availability.away, reasons=availability.reasons, until_s=until_s)
        self._events.emit(event)
