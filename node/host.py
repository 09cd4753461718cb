"""Composition root of a host: key, DHT, blocks, runtime, server, announcer, checkpoints; started, stopped in order."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import psutil
import torch

from dht.announcer import Announcement, Announcer
from node.checkpoint import read_checkpoint, write_checkpoint
from node.devices import pick_device
from node.experts.block import Block, new_block
from node.experts.state import block_metadata, block_tensors, restore_block
from node.folders import prepare_folder
from node.metrics import start_metrics
from node.placement import choose_blocks, parse_blocks
from node.serving.runtime import Runtime, RuntimeConfig
from node.serving.server import ExpertServer
from node.serving.service import ExpertService
from node.swarm import Swarm, until_stopped
from protocol import expert_pb2 as pb
from protocol.announcements import BlockRecord, PeerRecord
from protocol.errors import CheckpointError
from protocol.events import EventLog
from protocol.identity import Identity
from protocol.manifest import BlockId
from protocol.settings import check_minimums
from protocol.version import SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from node.config import HostConfig
    from protocol.manifest import Manifest

logger = logging.getLogger(__name__)

MINIMUMS = {
    "max_blocks": 1,
    "threads": 1,
    "port": 0,
    "metrics_port": 0,
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
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    prepare_folder(config.state)
    identity = Identity.load_or_create(config.state / "identity.key")
    events = EventLog(config.state / "events.jsonl")
    swarm = Swarm(config, identity)
    try:
        await until_stopped(swarm.join(), stop)
        block_ids = _pick_blocks(config, swarm)
        blocks = await asyncio.to_thread(_load_blocks, config.state, swarm.manifest, block_ids, device)
        host = Host(config, swarm, blocks, events, started)
        await host.serve(device, stop)
    finally:
        await swarm.leave()
        events.close()


class Host:
    """The parts of a running host, wired."""

    def __init__(
        self, config: HostConfig, swarm: Swarm, blocks: Sequence[Block], events: EventLog, started: float
    ) -> None:
        self._config, self._swarm, self._events, self._started = config, swarm, events, started
        self._saved: dict[BlockId, int] = {block.id: -1 for block in blocks}
        self.runtime = Runtime(
            blocks,
            swarm.manifest.optimizer,
            RuntimeConfig(
                max_queue_tokens=config.max_queue_tokens,
                keep_inputs_bytes=config.keep_inputs_mb << 20,
                keep_inputs_s=config.keep_inputs_s,
            ),
        )
        self._endpoint = ""

    async def serve(self, device: torch.device, stop: asyncio.Event) -> None:
        """Start, announce, wait for `stop`, leave."""
        manifest, config = self._swarm.manifest, self._config
        about = pb.DescribeResponse(run_id=manifest.run_id, peer_id=self._swarm.identity.peer_id, software=SOFTWARE)
        service = ExpertService(manifest, self.runtime, device, about)
        server = ExpertServer(service, config.listen, config.port)
        announcer = Announcer(self._swarm.dht, self._swarm.identity, manifest.run_id, describe=self._describe)
        self.runtime.start()
        try:
            await server.start()
            self._endpoint = server.endpoint
            with start_metrics(self.runtime, service, config.listen, config.metrics_port):
                await announcer.start()
                self._tell_announced(device)
                await self._until(stop)
            await self._leave(announcer, server)
        finally:
            await announcer.stop()
            await server.drain(0)
            await asyncio.to_thread(self.runtime.stop, RUNTIME_STOP_S)

    def _tell_announced(self, device: torch.device) -> None:
        blocks = self.runtime.blocks
        seconds = round(time.time() - self._started, 2)
        self._events.emit(
            "announced",
            run_id=self._swarm.manifest.run_id,
            peer_id=self._swarm.identity.peer_id,
            endpoint=self._endpoint,
            addresses=list(self._swarm.dht.addresses),
            versions={str(block_id): block.version for block_id, block in blocks.items()},
            device=str(device),
            seconds_since_start=seconds,
        )
        n_experts = sum(len(block.experts) for block in blocks.values())
        what = f"{n_experts} experts in {len(blocks)} blocks"
        logger.info("Hosting %s at %s on %s, announced after %.1f s", what, self._endpoint, device, seconds)

    async def _until(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._checkpoints()), group.create_task(self._load_events())]
            await stop.wait()
            for task in tasks:
                task.cancel()

    async def _leave(self, announcer: Announcer, server: ExpertServer) -> None:
        """Withdraw the records while running calls end, then save what they changed."""
        self._events.emit("leave")
        await asyncio.gather(announcer.withdraw(), server.drain(DRAIN_GRACE_S))
        await self._save()

    async def _checkpoints(self) -> None:
        while True:
            await asyncio.sleep(self._config.checkpoint_every_s)
            await self._save()

    async def _save(self) -> None:
        """Write the blocks that changed; a full disk is reported and does not stop the host."""
        started = time.monotonic()
        changed = [block for block in self.runtime.blocks.values() if block.version != self._saved[block.id]]
        try:
            for block in changed:
                version = await self._save_block(block)
                self._saved[block.id] = version
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says all, a stack trace would hide it
            self._events.emit("checkpoint_failed", reason=str(error))
            return
        if changed:
            self._events.emit("checkpoint", blocks=len(changed), seconds=round(time.monotonic() - started, 3))

    async def _save_block(self, block: Block) -> int:
        run_id = self._swarm.manifest.run_id
        copy = self.runtime.call(lambda: (block_tensors(block), block_metadata(block, run_id)))
        tensors, metadata = await asyncio.wrap_future(copy)
        await asyncio.to_thread(write_checkpoint, block_path(self._config.state, block.id), tensors, metadata)
        return int(metadata["version"])

    async def _load_events(self) -> None:
        while True:
            await asyncio.sleep(LOAD_EVENT_PERIOD_S)
            runtime = self.runtime
            self._events.emit(
                "load",
                tokens_per_s=round(runtime.tokens_per_s, 1),
                tokens_total=runtime.tokens_total,
                queue_tokens=runtime.queue_tokens,
                kept_inputs_bytes=runtime.kept_bytes,
                refused=runtime.refused,
            )

    def _describe(self) -> Announcement:
        runtime = self.runtime
        queue_tokens, tokens_per_s = runtime.queue_tokens, runtime.tokens_per_s
        blocks = tuple(
            BlockRecord(
                block=block_id,
                version=block.version,
                endpoint=self._endpoint,
                queue_tokens=queue_tokens,
                tokens_per_s=tokens_per_s,
                tokens_total=runtime.tokens_total,
                n_experts=len(block.experts),
            )
            for block_id, block in runtime.blocks.items()
        )
        peer = PeerRecord(
            role="host",
            endpoint=self._endpoint,
            software=SOFTWARE,
            started_s=self._started,
            n_blocks=len(blocks),
            queue_tokens=queue_tokens,
            tokens_per_s=tokens_per_s,
        )
        return Announcement(peer=peer, blocks=blocks)


def block_path(state: Path, block_id: BlockId) -> Path:
    """Where a host keeps the checkpoint of a block."""
    return state / "blocks" / f"{block_id.layer}-{block_id.block}.safetensors"


def _pick_blocks(config: HostConfig, swarm: Swarm) -> list[BlockId]:
    model = swarm.manifest.model
    if config.blocks != "auto":
        return parse_blocks(config.blocks, model)
    view = swarm.directory.snapshot()
    n_replicas = {block: len(replicas) for block, replicas in view.replicas.items()}
    return choose_blocks(model, n_replicas, swarm.identity.peer_id, config.max_blocks, _own_blocks(config.state))


def _own_blocks(state: Path) -> set[BlockId]:
    found = set()
    for path in (state / "blocks").glob("*.safetensors"):
        layer, _, block = path.name.split(".")[0].partition("-")
        if layer.isdecimal() and block.isdecimal():
            found.add(BlockId(int(layer), int(block)))
    return found


def _load_blocks(state: Path, manifest: Manifest, block_ids: Sequence[BlockId], device: torch.device) -> list[Block]:
    """From this host's checkpoints where there are any, else as the run's seed has them."""
    blocks = []
    for block_id in block_ids:
        stored = read_checkpoint(block_path(state, block_id))
        if stored is None:
            blocks.append(new_block(manifest, block_id, device))
        else:
            blocks.append(restore_block(manifest, block_id, *stored, device))
    return blocks
