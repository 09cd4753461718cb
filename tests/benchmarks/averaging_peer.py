"""python -m tests.benchmarks.averaging_peer --index 0 --peers 4 --blocks 1 --codec fp32

One peer of the product's averaging, for `averaging.py`: this process and p2pd, with the parts of a host that averaging
needs (DHT, announcer, directory, gRPC server, averager) around blocks that only averaging changes. Commands are
lines on standard input: `reset SEED` fills the tensors, `go` lets the averager begin, `stop` ends it; at the end of
input the peer leaves. It says `averaging` when the tensors begin to move, `sample` whenever they have changed, and
`dialled` after each exchange that it began.

Shapes: R rows (experts of a block), C columns, S sampled values.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import tyro
import uvloop

from common.errors import NotHostedError
from common.events import EventLog
from dht.announcer import Announcement, Announcer
from dht.directory import Directory
from dht.node import DhtConfig, DhtNode
from node.averaging.events import ExchangeEvent
from node.averaging.node_averaging import Averaging, AveragingOptions
from node.averaging.service import SERVICE_NAME
from node.model.replica_state import ReplicaState
from node.rpc.server import NodeServer
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord
from protocol.identity import Identity
from protocol.manifest import AveragingCodec, AveragingConfig, BlockId, Manifest, ModelConfig, all_blocks
from protocol.security import Security
from tests.benchmarks.averaging_parts import (
    BLOCK_SHAPE,
    BLOCK_TENSORS,
    Answers,
    sampled,
    start_tensors,
    values_per_tensor,
)
from tests.benchmarks.peer_process import private_stdout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from common.events import Event
    from tests.benchmarks.averaging_parts import Floats

R = TypeVar("R")

LAYER = 0
ADDRESS = "127.0.0.1"
CLIP_RADIUS = 10.0
"""Random starts have nothing in common, unlike replicas of a run, whose differences the default radius is for."""
MEET_TIMEOUT_S = 60.0
DRAIN_S = 0.2


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One of `peers` that hold replicas of the same block."""

    index: int
    peers: int
    blocks: int
    """Of 1 MB; a host averages block by block."""
    codec: AveragingCodec = "fp32"
    """Of weights and their differences on the wire."""
    period_s: float = 0.5
    """Seconds between the exchanges that a peer begins: short, as a round is to end soon."""
    initial_peers: tuple[str, ...] = ()
    """Addresses of the first peer's DHT; none: this is the first."""

    def manifest(self) -> Manifest:
        """One layer of these blocks."""
        n_experts, _ = BLOCK_SHAPE
        model = ModelConfig(n_layers=1, experts_per_layer=n_experts * self.blocks, experts_per_block=n_experts)
        averaging = AveragingConfig(period_s=self.period_s, codec=self.codec, clip_radius=CLIP_RADIUS)
        return Manifest(name="bench", model=model, averaging=averaging)


class Weights:
    """All blocks and the one thread that touches them, as on a host; whenever a block has changed this says so."""

    def __init__(self, blocks: int, answers: Answers) -> None:
        self.states = [_zeros() for _ in range(blocks)]
        self._per_tensor, self._answers = values_per_tensor(blocks), answers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._said = [self._sampled(state) for state in self.states]
        self._untouched, self._seed = True, 0

    def call(self, block: int, function: Callable[[ReplicaState], R]) -> Future[R]:
        """As averaging calls it, for one block."""
        return self._thread.submit(self._run, block, function)

    def fill(self, values: Iterator[Floats], seed: int) -> Future[None]:
        """Replace all weights and say what they are, in the round with this seed."""
        return self._thread.submit(self._fill, values, seed)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _run(self, block: int, function: Callable[[ReplicaState], R]) -> R:
        if self._untouched:
            self._untouched = False
            self._answers.say("averaging")
        result = function(self.states[block])
        now_S = self._sampled(self.states[block])
        if not np.array_equal(now_S, self._said[block]):
            self._said[block] = now_S
            self._answers.say_sample(self._seed, now_S, block * now_S.size)
        return result

    def _fill(self, values: Iterator[Floats], seed: int) -> None:
        self._seed = seed
        for state in self.states:
            for weight_RC in state.params.values():
                weight_RC.copy_(torch.from_numpy(next(values)))
            state.version += 1  # or those who met in the round before would think that there is nothing new
        self._untouched = True
        self._said = [self._sampled(state) for state in self.states]
        self._answers.say_sample(seed, np.concatenate(self._said))

    def _sampled(self, state: ReplicaState) -> Floats:
        return sampled((weight_RC.numpy() for weight_RC in state.params.values()), self._per_tensor)


class SampledReplica:
    """One block of `Weights` as averaging sees it, in one round: weights alone, as hivemind is given them."""

    def __init__(self, weights: Weights, block: int) -> None:
        self.id = BlockId(LAYER, block)
        self._weights, self._block = weights, block
        self._over = False

    @property
    def version(self) -> int:
        return self._weights.states[self._block].version

    def call(self, function: Callable[[ReplicaState], R]) -> Future[R]:
        if self._over:
            refused: Future[R] = Future()
            refused.set_exception(NotHostedError("block", f"{self.id} is of a round that is over"))
            return refused
        return self._weights.call(self._block, function)

    look = call

    def end(self) -> None:
        """An exchange that is still under way must not move the weights of the next round."""
        self._over = True


def _zeros() -> ReplicaState:
    n_experts, _ = BLOCK_SHAPE
    return ReplicaState(
        params={f"w{index}": torch.zeros(BLOCK_SHAPE) for index in range(BLOCK_TENSORS)},
        first={},
        second={},
        steps_R=torch.zeros(n_experts, dtype=torch.int64),
        learnt_R=torch.zeros(n_experts, dtype=torch.float64),
        version=0,
    )


class Peer:
    """The parts of a host that averaging needs, wired."""

    def __init__(self, config: PeerConfig, answers: Answers, dht: DhtNode, identity: Identity) -> None:
        self._config, self._answers = config, answers
        manifest = config.manifest()
        self._blocks = all_blocks(manifest.model)
        self._weights = Weights(config.blocks, answers)
        self._directory = Directory(dht, manifest.run_id, manifest.model)
        events, security = EventLog(), Security(identity)
        events.subscribe(self._tell_dialled)
        options = AveragingOptions(seed=config.index)
        self._averaging = Averaging(manifest, security, self._directory, events, options)
        self._replicas: list[SampledReplica] = []
        self._begin_round()
        self._server = NodeServer((self._averaging.service.handler(),), (SERVICE_NAME,), ADDRESS, 0, security)
        self._announcer = Announcer(dht, identity, Admission(manifest.run_id), describe=self._describe)

    async def start(self, stack: AsyncExitStack) -> None:
        """Serve, announce, wait until every peer is in the directory."""
        stack.callback(self._weights.close)
        stack.push_async_callback(self._server.drain, DRAIN_S)
        await self._server.start()
        stack.push_async_callback(self._announcer.stop)
        await self._announcer.start()
        stack.push_async_callback(self._directory.stop)
        await self._directory.start()
        stack.push_async_callback(self._averaging.stop)
        async with asyncio.timeout(MEET_TIMEOUT_S):
            while any(len(self._directory.replicas(block)) < self._config.peers for block in self._blocks):
                await self._directory.wait_for_change(MEET_TIMEOUT_S)

    async def obey(self, lines: AsyncIterator[str]) -> None:
        """Until they end."""
        async for line in lines:
            command, _, argument = line.partition(" ")
            if command == "reset":
                self._begin_round()
                seed = int(argument)
                values = start_tensors(self._config.blocks, seed, self._config.index)
                await asyncio.wrap_future(self._weights.fill(values, seed))
                self._answers.say("reset", self._averaging.client.wire_bytes)
            elif command == "go":
                self._averaging.averager.start()
            elif command == "stop":
                await self._averaging.averager.stop()
                # What was broken off is in the client's count alone.
                self._answers.say("stopped", self._averaging.client.wire_bytes)
            else:
                raise SystemExit(f"unknown command: {command!r}")

    def _begin_round(self) -> None:
        for replica in self._replicas:
            replica.end()
        self._replicas = [SampledReplica(self._weights, block) for block in range(self._config.blocks)]
        for replica in self._replicas:
            self._averaging.replicas.add(replica)

    def _tell_dialled(self, event: Event, _t_s: float) -> None:
        if isinstance(event, ExchangeEvent) and event.dialled:
            self._answers.say("dialled", {"seconds": event.seconds, "bytes": event.bytes})

    def _describe(self) -> Announcement:
        endpoint, (n_experts, _) = self._server.endpoint, BLOCK_SHAPE
        blocks = tuple(
            BlockRecord(block=block, version=state.version, endpoint=endpoint, n_experts=n_experts)
            for block, state in zip(self._blocks, self._weights.states, strict=True)
        )
        return Announcement(peer=PeerRecord(role="host", endpoint=endpoint, n_blocks=len(blocks)), blocks=blocks)


async def run(config: PeerConfig, answers: Answers) -> None:
    """Until standard input ends."""
    identity = Identity.generate()
    async with AsyncExitStack() as stack:
        dht = await DhtNode.start(DhtConfig(identity=identity, initial_peers=config.initial_peers))
        stack.push_async_callback(dht.stop)
        answers.say("up", list(dht.addresses))
        peer = Peer(config, answers, dht, identity)
        await peer.start(stack)
        answers.say("ready")
        await peer.obey(input_lines())


async def input_lines() -> AsyncIterator[str]:
    """Lines of standard input until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode().strip()


def main(config: PeerConfig) -> None:
    """Obey lines until standard input ends."""
    answers = Answers(private_stdout())
    torch.set_num_threads(1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(config, answers))


if __name__ == "__main__":
    main(tyro.cli(PeerConfig))
