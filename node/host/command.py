"""The command `host`: what is found wrong before anything starts, and one host after the other as addresses change."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch

from common.allocator import keep_freed_memory, keep_little_memory
from common.events import EventLog
from common.folders import FolderClaim, claimed
from common.log_tail import LogTail
from common.settings import check_minimums
from common.tasks import until_stopped
from node.host.capacity import events_bytes
from node.host.config import MINIMUMS
from node.host.host import Host
from node.host.owner_limits import OwnerLimits
from node.host.page_door import page_address, page_door
from node.membership.swarm import Swarm
from node.model.devices import limit_device_memory, pick_device
from protocol.identity import Identity
from protocol.profile import chosen_profile

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from node.host.config import HostConfig


async def run_host(config: HostConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain, save, withdraw. Raises a KilohiveError if the start fails."""
    # From the command itself: imports take seconds, and a person waits for them too.
    started = psutil.Process().create_time()
    check_minimums(config, MINIMUMS)
    address = page_address(config.page_listen, "--page-listen")
    owner_limits = OwnerLimits(config)
    config, limits = owner_limits.config, owner_limits.limits
    chosen_profile(config.name, config.team, started)  # a mistake in it is told before anything is started
    torch.set_num_threads(config.threads)
    _ = keep_freed_memory() if limits.memory_bytes is None else keep_little_memory()
    device = pick_device(config.device)
    limit_device_memory(device, limits.gpu_memory_bytes)
    with claimed(FolderClaim(folder=config.state, role="host", flag="--state")), LogTail().listening() as log:
        identity = Identity.load_or_create(config.state / "identity.key")
        max_bytes, n_files = events_bytes(config, limits), config.event_log_files
        events = EventLog(config.state / "events.jsonl", max_bytes=max_bytes, n_files=n_files)
        try:
            async with page_door(config.state, address):
                moved = True
                while moved:
                    swarm = Swarm(config, identity, config, config.state)
                    build = partial(Host, owner_limits, swarm, device, events, log, started)
                    moved = await _serve_at_one_address(swarm, stop, build)
        finally:
            events.close()


async def _serve_at_one_address(swarm: Swarm, stop: asyncio.Event, build: Callable[[], Host]) -> bool:
    """Serve until `stop` is set; whether this machine's address has changed instead, and the host is to join again."""
    try:
        await until_stopped(swarm.join(), stop)
        swarm.dht.on_lost(stop.set)
        watch = swarm.address_watch()
        async with watch.stopping(stop) as ended:
            await build().serve(ended)
        swarm.dht.raise_if_lost()
        watch.raise_if_lost()
        return bool(watch.moved_to) and not stop.is_set()
    finally:
        await swarm.leave()
