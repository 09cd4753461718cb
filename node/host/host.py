"""Composition root of a host: key, DHT, blocks, runtime, server, averaging, announcer; started, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import psutil
import torch

from common.allocator import keep_freed_memory, keep_little_memory
from common.errors import CheckpointError, DrainingError, UnavailableError
from common.events import EventLog
from common.folders import prepare_folder
from common.metrics import serve_metrics
from common.settings import check_minimums
from common.tasks import until_stopped
from dht.announcer import Announcer
from node.averaging import service as averaging_service
from node.averaging.node_averaging import Averaging, AveragingOptions
from node.host.announcement import HostAnnouncement
from node.host.availability import Availability
from node.host.availability_monitor import AvailabilityMonitor
from node.host.block_manager import MAX_DOWNLOADS, BlockManager, BlockManagerParts
from node.host.block_store import BlockStore
from node.host.capacity import capacity_for, events_bytes, wanted_capacity
from node.host.expert_upload_service import ExpertUploadParts, ExpertUploadService
from node.host.memory_watch import MemoryWatch
from node.host.metrics import HostCollector
from node.host.pause import Pause, PauseParts
from node.host.placement import PlacementConfig, parse_blocks
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.host.serving.service import SERVICE_NAME, ExpertService
from node.host.signals import signals_heard
from node.limits.limits import Limits
from node.limits.memory import container_limit, lowest_limit
from node.limits.process_usage import ProcessUse
from node.limits.rate_limits import RateLimits
from node.membership import reachability
from node.membership.endpoint import NodeEndpoint
from node.membership.reachability import DialBackService
from node.membership.swarm import Swarm
from node.model.devices import limit_device_memory, pick_device
from node.rpc.health import server_told
from node.rpc.rate_limit_interceptor import RateLimitInterceptor
from node.rpc.server import NodeServer
from node.rpc.upload import INTAKE
from protocol import expert_pb2 as pb
from protocol.endpoints import Address, endpoint_text
from protocol.identity import Identity
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from node.host.config import HostConfig
    from node.limits.memory import Capacity
    from node.model.experts.block import Block
    from protocol.manifest import BlockId

logger = logging.getLogger(__name__)

AUTO = "auto"
MINIMUMS = {
    "max_blocks": 1,
    "recheck_s": 0,
    "threads": 1,
    "port": 0,
    "metrics_port": 0,
    "relay_circuits": 0,
    "max_queue_tokens": 1,
    "keep_inputs_mb": 0,
    "keep_inputs_s": 0,
    "checkpoint_every_s": 0.1,
    "join_timeout_s": 0.1,
}

LOAD_EVENT_PERIOD_S = 2.0
DRAIN_GRACE_S = 0.5
RUNTIME_STOP_S = 1.0


async def run_host(config: HostConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain, save, withdraw. Raises a KilohiveError if the start fails."""
    # From the command itself: imports take seconds, and a person waits for them too.
    started = psutil.Process().create_time()
    check_minimums(config, MINIMUMS)
    limits = Limits.of(config)
    torch.set_num_threads(config.threads)
    _ = keep_freed_memory() if limits.memory_bytes is None else keep_little_memory()
    device = pick_device(config.device)
    limit_device_memory(device, limits.gpu_memory_bytes)
    prepare_folder(config.state)
    identity = Identity.load_or_create(config.state / "identity.key")
    events = EventLog(config.state / "events.jsonl", max_bytes=events_bytes(limits))
    swarm = Swarm(config, identity)
    try:
        await until_stopped(swarm.join(), stop)
        swarm.dht.on_lost(stop.set)
        await Host(config, limits, swarm, device, events, started).serve(stop)
        swarm.dht.raise_if_lost()
    finally:
        await swarm.leave()
        events.close()


class Host:
    """The parts of a running host, wired."""

    def __init__(
        self,
        config: HostConfig,
        limits: Limits,
        swarm: Swarm,
        device: torch.device,
        events: EventLog,
        started: float,
    ) -> None:
        self._config, self._limits, self._swarm, self._device, self._events = config, limits, swarm, device, events
        self._started = started
        self._use = ProcessUse(swarm.dht.daemon_pid)
        swarm.dht.on_restart(lambda: self._use.follow(swarm.dht.daemon_pid))
        self._rate_limits = RateLimits(limits, self._use)
        self._availability = Availability()
        self._watch = AvailabilityMonitor(self._availability, limits, self._use)
        self._capacity = self._find_capacity()
        manifest, peer_id = swarm.manifest, swarm.identity.peer_id
        self._saved: dict[BlockId, int] = {}
        self._store = BlockStore(config.state, manifest, device)
        self.runtime = Runtime(
            (),
            manifest,
            RuntimeConfig(
                max_queue_tokens=self._capacity.max_queue_tokens,
                max_batch_tokens=self._capacity.max_batch_tokens,
                keep_inputs_bytes=self._capacity.keep_inputs_bytes,
                keep_inputs_s=config.keep_inputs_s,
            ),
            rest_s=self._rate_limits.rest_s,
        )
        options = AveragingOptions(stored=self._store.state, rate_limits=self._rate_limits)
        self.averaging = Averaging(manifest, swarm.security, swarm.directory, events, options)
        self.block_manager = self._build_block_manager()
        self._memory = MemoryWatch(self._memory_limit, self._use, self.block_manager.give_up_one)
        about = pb.DescribeResponse(run_id=manifest.run_id, peer_id=peer_id, software=SOFTWARE)
        self._service = ExpertService(manifest, self.runtime, device, about)
        self._server = NodeServer(
            (
                self._service.handler(),
                self.averaging.service.handler(),
                self._intake().handler(),
                DialBackService(swarm.security.caller(), swarm.listen).handler(),
            ),
            (SERVICE_NAME, averaging_service.SERVICE_NAME, INTAKE, reachability.SERVICE_NAME),
            swarm.listen,
            config.port,
            swarm.security,
            RateLimitInterceptor(
                self._rate_limits,
                lambda: self._availability.refusal() or self._memory.refusal(),
                self._capacity.max_calls,
            ),
        )
        self._node_endpoint = NodeEndpoint(swarm, events, config.relay_circuits)
        self._announcer = Announcer(swarm.dht, swarm.identity, swarm.admission, describe=self._records().describe)
        self.block_manager.announcer = self._announcer
        self._pause = self._build_pause()

    @property
    def _memory_limit(self) -> int | None:
        return lowest_limit(self._limits.memory_bytes, container_limit())

    def _find_capacity(self) -> Capacity:
        """What the limits leave of what was asked for; told if that is less."""
        fixed, manifest = self._fixed_blocks(), self._swarm.manifest
        wanted = wanted_capacity(self._config, len(fixed) or self._config.max_blocks)
        used_bytes = self._use.memory_bytes()
        capacity = capacity_for(wanted, self._limits, manifest, self._device, used_bytes, container_limit())
        if capacity.max_blocks < wanted.max_blocks:
            logger.warning(
                "Room for %d blocks, not for %d, under this host's limits", capacity.max_blocks, wanted.max_blocks
            )
        self._events.emit("limits", limits=self._limits.told(), room=asdict(capacity), memory_bytes=used_bytes)
        return capacity

    def _fixed_blocks(self) -> list[BlockId]:
        config = self._config
        return [] if config.blocks == AUTO else parse_blocks(config.blocks, self._swarm.manifest.model)

    def _build_block_manager(self) -> BlockManager:
        config, swarm, limits = self._config, self._swarm, self._limits
        parts = BlockManagerParts(
            manifest=swarm.manifest,
            peer_id=swarm.identity.peer_id,
            directory=swarm.directory,
            runtime=self.runtime,
            averaging=self.averaging,
            store=self._store,
            events=self._events,
            device=self._device,
            clock=time.monotonic,
            pausing=self._availability.pausing,
            # Two at once would wait for each other's rests until their senders give up.
            max_downloads=1 if limits.down_bytes_per_s or limits.cpu_percent else MAX_DOWNLOADS,
        )
        placement = PlacementConfig(
            max_blocks=self._capacity.max_blocks,
            target_replicas=swarm.manifest.averaging.target_replicas,
            check_s=config.recheck_s,
        )
        return BlockManager(parts, placement, self._fixed_blocks())

    def _intake(self) -> ExpertUploadService:
        parts = ExpertUploadParts(
            manifest=self._swarm.manifest,
            runtime=self.runtime,
            peers=self._swarm.directory.peers,
            events=self._events,
            rate_limits=self._rate_limits,
            since_s=self._started,
        )
        return ExpertUploadService(parts)

    def _build_pause(self) -> Pause:
        swarm = self._swarm
        parts = PauseParts(
            peer_id=swarm.identity.peer_id,
            availability=self._availability,
            block_manager=self.block_manager,
            runtime=self.runtime,
            averager=self.averaging.averager,
            directory=swarm.directory,
            events=self._events,
        )
        return Pause(parts)

    def _records(self) -> HostAnnouncement:
        return HostAnnouncement(
            manifest=self._swarm.manifest,
            started=self._started,
            node_endpoint=self._node_endpoint,
            runtime=self.runtime,
            block_manager=self.block_manager,
            averager=self.averaging.averager,
            availability=self._availability,
            exchanged_bytes=self._exchanged_bytes,
        )

    async def serve(self, stop: asyncio.Event) -> None:
        """Start, take blocks, announce them, wait for `stop`, leave."""
        self.runtime.start()
        # To the end: a signal that nobody hears would kill the node before it has saved.
        with signals_heard(self._availability, self._tell_asked):
            try:
                await self._server.start()
                await self._work(stop)
                await self._leave()
            finally:
                await asyncio.gather(
                    self._announcer.stop(), self.averaging.stop(), self._node_endpoint.close(), self._server.drain(0)
                )
                await asyncio.to_thread(self.runtime.stop, RUNTIME_STOP_S)

    async def _work(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, or the owner asks this host to leave and it has handed its blocks over."""
        config = self._config
        collector = HostCollector(self.runtime, self._service, self._exchanged_bytes)
        metrics = serve_metrics(collector, self._swarm.listen, config.metrics_port)
        address = Address(self._swarm.identity.peer_id, self._server.endpoint)
        with (
            metrics,
            server_told(config.state, address, obeys=True, admission=self._swarm.admission),
            contextlib.suppress(DrainingError),
        ):
            await until_stopped(self._node_endpoint.settle(self._server.endpoint), stop)
            await until_stopped(self._first_blocks(), stop)
            self.averaging.start()
            self._tell_announced()
            await self._until(stop)
            if not stop.is_set():
                await until_stopped(self._pause.hand_over(), stop)

    async def _first_blocks(self) -> None:
        self.block_manager.stored = await asyncio.to_thread(self._store.versions)
        await self._announcer.start()
        # Others that start now are seen by their first word, and what they join by their second.
        with contextlib.suppress(UnavailableError):
            await self._swarm.directory.refresh_now()
        with contextlib.suppress(DrainingError):
            await until_stopped(self.block_manager.take_first(), self._availability.pausing)
        self._saved = dict.fromkeys(self.runtime.blocks, -1)
        try:
            await self._announcer.announce_now()
        except UnavailableError as error:
            logger.warning("The DHT does not answer, announcing later: %s", error)

    def _tell_announced(self) -> None:
        blocks = self.runtime.blocks
        seconds = round(time.time() - self._started, 2)
        endpoint = self._node_endpoint.endpoint
        self._events.emit(
            "announced",
            run_id=self._swarm.manifest.run_id,
            peer_id=self._swarm.identity.peer_id,
            endpoint=endpoint,
            addresses=list(self._swarm.dht.addresses),
            versions={str(block_id): block.version for block_id, block in sorted(blocks.items())},
            device=str(self._device),
            seconds_since_start=seconds,
        )
        n_experts = sum(len(block.experts) for block in blocks.values())
        what = f"{n_experts} experts in {len(blocks)} blocks"
        where = endpoint_text(endpoint)
        logger.info("Hosting %s at %s on %s, announced after %.1f s", what, where, self._device, seconds)

    def _tell_asked(self, word: str) -> None:
        self._events.emit("asked", word=word, paused=self._availability.away, reasons=list(self._availability.reasons))

    async def _until(self, stop: asyncio.Event) -> None:
        """What goes on until `stop` is set or the owner asks this host to leave."""
        work = [self._checkpoints(), self._load_events(), self._memory.watch(), self._watch_device()]
        work += [self._node_endpoint.watch(self._announcer), self._watch.watch(), self._pause.follow()]
        if self._config.recheck_s:
            work.append(self.block_manager.recheck_forever())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
            with contextlib.suppress(DrainingError):
                await until_stopped(self._availability.leave.wait(), stop)
            for task in tasks:
                task.cancel()

    async def _leave(self) -> None:
        """Withdraw the records while running calls end, then save what they changed."""
        self._events.emit("leave")
        await asyncio.gather(self._announcer.withdraw(), self.averaging.stop(), self._server.drain(DRAIN_GRACE_S))
        await self._save()

    async def _checkpoints(self) -> None:
        while True:
            await asyncio.sleep(self._config.checkpoint_every_s)
            await self._save()

    async def _save(self) -> None:
        """Write the blocks that changed; a full disk is reported and does not stop the host."""
        started = time.monotonic()
        changed = [block for block in self.runtime.blocks.values() if block.version != self._saved.get(block.id)]
        try:
            for block in changed:
                version = await self._save_block(block)
                self._saved[block.id] = version
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._events.emit("checkpoint_failed", reason=str(error))
            return
        await self._keep_disk_limit()
        if changed:
            self._events.emit("checkpoint", blocks=len(changed), seconds=round(time.monotonic() - started, 3))

    async def _keep_disk_limit(self) -> None:
        """Fewer stored blocks; those that are hosted stay."""
        limit = self._limits.disk_bytes
        if limit is None:
            return
        gone = await asyncio.to_thread(self._store.trim, limit, frozenset(self.runtime.blocks))
        for block_id in gone:
            self.block_manager.stored.pop(block_id, None)

    async def _watch_device(self) -> None:
        """A device without memory for a batch holds too many blocks."""
        seen = 0
        while True:
            await asyncio.sleep(LOAD_EVENT_PERIOD_S)
            if self.runtime.out_of_memory > seen:
                seen = self.runtime.out_of_memory
                await self.block_manager.give_up_one("the device had no memory for a batch")

    async def _save_block(self, block: Block) -> int:
        copy = self.runtime.call(lambda: self._store.copy(block))
        tensors, metadata = await asyncio.wrap_future(copy)
        await asyncio.to_thread(self._store.write, block.id, tensors, metadata)
        return int(metadata["version"])

    async def _load_events(self) -> None:
        while True:
            await asyncio.sleep(LOAD_EVENT_PERIOD_S)
            runtime, rate_limits = self.runtime, self._rate_limits
            rate_limits.count_child()
            self._events.emit(
                "load",
                tokens_per_s=round(runtime.tokens_per_s, 1),
                tokens_total=runtime.tokens_total,
                queue_tokens=runtime.queue_tokens,
                kept_inputs_bytes=runtime.kept_bytes,
                refused=runtime.refused,
                staleness=round(runtime.staleness, 3),
                steps_refused=runtime.steps_refused,
                exchanged_bytes=self._exchanged_bytes(),
                sent_bytes=rate_limits.sent_bytes,
                received_bytes=rate_limits.received_bytes,
                cpu_s=round(rate_limits.cpu_s, 2),
                memory_bytes=self._memory.used_bytes,
            )

    def _exchanged_bytes(self) -> int:
        return self.averaging.averager.exchanged_bytes + self.block_manager.downloaded_bytes
