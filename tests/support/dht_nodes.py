"""Real DHT nodes for tests: started on loopback, stopped at the end, with records to store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from dht.node import DhtConfig, DhtNode
from dht.record_store import Entry
from protocol.announcements import PeerRecord, encode_peer
from protocol.identity import Identity
from protocol.manifest import Manifest, ModelConfig
from protocol.records import peers_key, sign_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MODEL = ModelConfig(n_layers=1, experts_per_layer=8, experts_per_block=4)
MANIFEST = Manifest(name="test", model=MODEL)
RUN = MANIFEST.run_id
KEY = peers_key(RUN)


class Start(Protocol):
    """Starts a node with an identity of its own that joins through `initial`; `changes` are fields of DhtConfig."""

    def __call__(self, *initial: DhtNode, **changes: object) -> Awaitable[DhtNode]: ...


@contextlib.asynccontextmanager
async def running_nodes() -> AsyncIterator[Start]:
    """Stops every node that was started."""
    async with contextlib.AsyncExitStack() as stack:

        async def start_one(*initial: DhtNode, **changes: object) -> DhtNode:
            initial_peers = tuple(address for node in initial for address in node.addresses)
            config = DhtConfig(identity=Identity.generate(), initial_peers=initial_peers)
            node = await DhtNode.start(replace(config, **changes))  # type: ignore[arg-type]
            stack.push_async_callback(node.stop)
            return node

        yield start_one


def cut_power(node: DhtNode) -> None:
    """End a node as a power cut would: its p2pd dies, and nobody starts it again."""
    for task in node._tasks:
        task.cancel()
    os.kill(node.daemon_pid, signal.SIGKILL)


def entry_by(
    identity: Identity, *, version: int = 1, ttl_s: float = 30.0, key: str = KEY, ticket: bytes = b""
) -> Entry:
    """A good record."""
    expiration_s = time.time() + ttl_s
    payload = encode_peer(PeerRecord(role="host", run_tokens=version))
    raw = sign_record(identity, key=key, version=version, expiration_s=expiration_s, payload=payload, ticket=ticket)
    return Entry(key, identity.peer_id, raw, expiration_s)


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 15.0) -> None:
    """Wait for what happens in other processes."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - nothing here is told when it happens
            await asyncio.sleep(0.05)
