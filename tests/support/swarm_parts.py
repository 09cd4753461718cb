"""A host's real server and a trainer's real dispatcher in one process, joined by a directory that tests control."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import uvloop

from dht.view import Replica
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.host.serving.service import SERVICE_NAME, ExpertService
from node.model.experts.block import Block, new_block
from node.rpc.server import NodeServer
from node.trainer.dispatch.client import ExpertClient
from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher
from protocol import expert_pb2 as pb
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.manifest import BlockId, Manifest, ModelConfig, OptimizerConfig, all_blocks
from protocol.security import Security

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from protocol.security import Caller

R = TypeVar("R")
CPU = torch.device("cpu")
PLAIN = Security(Identity.generate(), insecure_local=True)
"""Calls inside one process, whose peers have the names that a test gives them."""


def small_manifest(**changes: Any) -> Manifest:
    """16 experts in each of 2 layers, in blocks of 4; D=16, H=8, K=2. `model`, `optimizer` take dicts of changes."""
    model = ModelConfig(
        d_model=16,
        n_heads=2,
        context=16,
        expert_hidden=8,
        experts_per_layer=16,
        experts_per_block=4,
        experts_per_token=2,
    )
    optimizer = OptimizerConfig(warmup_tokens=0, total_tokens=1_000_000)
    return Manifest(
        name="test",
        model=replace(model, **changes.pop("model", {})),
        optimizer=replace(optimizer, **changes.pop("optimizer", {})),
        **changes,
    )


@dataclass
class FakeDirectory:
    """Replicas as the test sets them; remembers who was reported."""

    table: dict[BlockId, tuple[Replica, ...]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    avoided: set[str] = field(default_factory=set)
    generation: int = 0

    def add(self, peer_id: str, endpoint: str, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            replica = make_replica(block, peer_id, endpoint)
            self.table[block] = (*self.table.get(block, ()), replica)
        self.generation += 1

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        return tuple(r for r in self.table.get(block, ()) if r.peer_id not in self.avoided)

    async def wait_for_change(self, timeout_s: float) -> bool:
        generation = self.generation
        await asyncio.sleep(timeout_s)
        return self.generation != generation

    def report_failure(self, peer_id: str, retry_after_s: float) -> None:
        self.failures.append(peer_id)
        self.retry_after_s.append(retry_after_s)
        self.avoided.add(peer_id)
        self.generation += 1

    def report_success(self, peer_id: str) -> None:
        if peer_id in self.avoided:
            self.avoided.discard(peer_id)
            self.generation += 1


def make_replica(block: BlockId, peer_id: str, endpoint: str) -> Replica:
    return Replica(
        block=block,
        peer_id=peer_id,
        endpoint=endpoint,
        version=0,
        n_experts=4,
        queue_tokens=0,
        tokens_per_s=0.0,
        tokens_total=0,
        expiration_s=2e9,
    )


class LoopThread:
    """An event loop in a thread, as a trainer has one beside its compute threads."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-event-loop")
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, R], timeout_s: float = 20.0) -> R:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


@dataclass
class TestHost:
    """One real gRPC server over one real runtime."""

    __test__ = False

    peer_id: str
    runtime: Runtime
    server: NodeServer
    service: ExpertService
    loop: LoopThread

    @property
    def address(self) -> Address:
        return Address(self.peer_id, self.server.endpoint)

    @property
    def blocks(self) -> Mapping[BlockId, Block]:
        return self.runtime.blocks

    def stop(self) -> None:
        self.loop.call(self.server.drain(0))
        self.runtime.stop(5)


async def _serve(
    manifest: Manifest,
    block_ids: Sequence[BlockId],
    peer_id: str,
    config: RuntimeConfig,
    loop: LoopThread,
    security: Security,
) -> TestHost:
    runtime = Runtime([new_block(manifest, block_id, CPU) for block_id in block_ids], manifest, config)
    service = ExpertService(manifest, runtime, CPU, pb.DescribeResponse(run_id=manifest.run_id, peer_id=peer_id))
    server = NodeServer((service.handler(),), (SERVICE_NAME,), "127.0.0.1", 0, security)
    runtime.start()
    await server.start()
    return TestHost(peer_id, runtime, server, service, loop)


@dataclass
class TestSwarm:
    """Some hosts, a directory that names them, and a dispatcher that calls them."""

    __test__ = False

    manifest: Manifest
    loop: LoopThread
    directory: FakeDirectory
    client: ExpertClient
    dispatcher: Dispatcher
    hosts: list[TestHost] = field(default_factory=list)

    def add_host(
        self,
        peer_id: str,
        block_ids: Sequence[BlockId],
        config: RuntimeConfig | None = None,
        security: Security = PLAIN,
    ) -> TestHost:
        serving = _serve(self.manifest, block_ids, peer_id, config or RuntimeConfig(), self.loop, security)
        host = self.loop.call(serving)
        self.directory.add(peer_id, host.server.endpoint, block_ids)
        self.hosts.append(host)
        return host

    def stop_hosts(self) -> None:
        for host in self.hosts:
            host.stop()

    def block(self, block_id: BlockId) -> Block:
        return next(host.blocks[block_id] for host in self.hosts if block_id in host.blocks)


def forget(swarm: TestSwarm, host: TestHost) -> None:
    """Close the dispatcher's channel to a host."""

    async def drop() -> None:
        swarm.client.channels.drop(host.address)

    swarm.loop.call(drop())


@contextmanager
def running_swarm(
    manifest: Manifest,
    n_hosts: int,
    config: DispatchConfig | None = None,
    make_client: Callable[[Caller], ExpertClient] = ExpertClient,
) -> Iterator[TestSwarm]:
    """`n_hosts` hosts that share every block of `manifest` evenly, one replica each."""
    loop = LoopThread()
    with ExitStack() as stack:
        stack.callback(loop.close)

        async def build() -> tuple[ExpertClient, Dispatcher]:
            client = make_client(PLAIN.caller())
            return client, Dispatcher(manifest, directory, client, config or DispatchConfig(), loop.loop)

        directory = FakeDirectory()
        client, dispatcher = loop.call(build())
        stack.callback(lambda: loop.call(client.close()))
        stack.callback(dispatcher.close)
        swarm = TestSwarm(manifest, loop, directory, client, dispatcher)
        stack.callback(swarm.stop_hosts)
        for index in range(n_hosts):
            swarm.add_host(f"peer{index}", all_blocks(manifest.model)[index::n_hosts])
        yield swarm
