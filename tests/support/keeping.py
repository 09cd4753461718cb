"""A host's block manager with a real runtime and real files, alone in a swarm that a test describes."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.events import EventLog
from dht.view import DirectoryView
from node.averaging.replica_set import ReplicaSet
from node.host.block_loader import BlockLoader
from node.host.block_manager import BlockManager
from node.host.block_store import BlockStore
from node.host.held_blocks import HeldBlocks
from node.host.placement import PlacementConfig
from node.host.placement_controller import PlacementController
from node.host.placement_planner import PlacementPlanner
from node.host.serving.runtime import Runtime, RuntimeConfig
from protocol.manifest import all_blocks
from tests.support.events import written_to
from tests.support.swarm_parts import CPU, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from protocol.manifest import BlockId

MANIFEST = small_manifest()
TIMEOUT_S = 10.0


@dataclass
class SeenDirectory:
    """What a host sees of the swarm, which a test sets."""

    view: DirectoryView

    def snapshot(self, **_: bool) -> DirectoryView:
        return self.view

    async def refresh_now(self) -> None:
        """From memory."""


@dataclass
class Keeping:
    """The block manager, what it works with and who decides for it, and what it said."""

    held: HeldBlocks
    block_manager: BlockManager
    planner: PlacementPlanner
    placement: PlacementController
    runtime: Runtime
    store: BlockStore
    replicas: ReplicaSet
    log: EventLog
    events: list[dict[str, Any]]
    announced: list[dict[BlockId, str]]
    directory: SeenDirectory

    def told(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


@contextmanager
def keeping(folder: Path, fixed: Sequence[BlockId] = (), max_blocks: int = 3) -> Iterator[Keeping]:
    """No other host is there, and the swarm needs every block."""
    runtime = Runtime((), MANIFEST, RuntimeConfig())
    replicas, store = ReplicaSet(), BlockStore(folder, MANIFEST, CPU)
    view = DirectoryView(replicas=dict.fromkeys(all_blocks(MANIFEST.model), ()))
    events, heard, announced = EventLog(), list[Any](), list[dict[Any, str]]()
    events.subscribe(written_to(heard))
    averaging = SimpleNamespace(replicas=replicas, averager=SimpleNamespace(unreachable=frozenset), client=None)
    held = HeldBlocks(runtime, cast("Any", averaging), store, time.monotonic)
    rng = random.Random("own")

    async def announce_now() -> bool:
        said = {**dict.fromkeys(held.given_up, "stored"), **dict.fromkeys(held.serving, "serving")}
        announced.append(said)
        return True

    seen = SeenDirectory(view)
    directory = cast("Any", seen)
    announcer = cast("Any", SimpleNamespace(announce_now=announce_now))
    loader = BlockLoader(MANIFEST, CPU, store, cast("Any", None), rng, one_by_one=lambda: False)
    block_manager = BlockManager(held, loader, directory, "own", announcer, events)
    config = PlacementConfig(max_blocks=max_blocks, target_replicas=1)
    planner = PlacementPlanner(directory, frozenset, "own", config, rng, fixed)
    placement = PlacementController(planner, block_manager, asyncio.Event(), events)
    runtime.start()
    try:
        yield Keeping(held, block_manager, planner, placement, runtime, store, replicas, events, heard, announced, seen)
    finally:
        runtime.stop(TIMEOUT_S)
