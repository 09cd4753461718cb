"""A host's keeper of blocks with a real runtime and real files, alone in a swarm that a test describes."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.events import EventLog
from dht.view import DirectoryView
from node.averaging.replica_set import ReplicaSet
from node.host.block_manager import BlockManager, BlockManagerParts
from node.host.block_store import BlockStore
from node.host.placement import PlacementConfig
from node.host.serving.runtime import Runtime, RuntimeConfig
from protocol.manifest import all_blocks
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from common.events import Event
    from protocol.manifest import BlockId

MANIFEST = small_manifest()
TIMEOUT_S = 10.0


@dataclass
class Keeping:
    """The keeper, what it works with, and what it said."""

    block_manager: BlockManager
    runtime: Runtime
    store: BlockStore
    replicas: ReplicaSet
    events: list[Event]
    announced: list[dict[BlockId, str]]

    def told(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]


@contextmanager
def keeping(folder: Path, fixed: Sequence[BlockId] = (), max_blocks: int = 3) -> Iterator[Keeping]:
    """No other host is there, and the swarm needs every block."""
    runtime = Runtime((), MANIFEST, RuntimeConfig())
    replicas, store = ReplicaSet(), BlockStore(folder, MANIFEST, CPU)
    view = DirectoryView(replicas=dict.fromkeys(all_blocks(MANIFEST.model), ()))
    events, heard, announced = EventLog(), list[Any](), list[dict[Any, str]]()
    events.subscribe(heard.append)
    averager = SimpleNamespace(unreachable=frozenset)
    parts = BlockManagerParts(
        manifest=MANIFEST,
        peer_id="own",
        directory=cast("Any", SimpleNamespace(snapshot=lambda **_: view)),
        runtime=runtime,
        averaging=cast("Any", SimpleNamespace(replicas=replicas, averager=averager, client=None)),
        store=store,
        events=events,
        device=CPU,
        clock=time.monotonic,
        pausing=asyncio.Event(),
    )
    block_manager = BlockManager(parts, PlacementConfig(max_blocks=max_blocks, target_replicas=1), fixed)

    async def announce_now() -> bool:
        said = {**dict.fromkeys(block_manager.given_up, "stored"), **dict.fromkeys(block_manager.serving, "serving")}
        announced.append(said)
        return True

    block_manager.announcer = cast("Any", SimpleNamespace(announce_now=announce_now))
    runtime.start()
    try:
        yield Keeping(block_manager, runtime, store, replicas, heard, announced)
    finally:
        runtime.stop(TIMEOUT_S)
