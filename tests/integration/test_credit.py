"""A host and two trainers over real gRPC: what is collected in the end is what the host itself has counted."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from common.errors import InvalidInputError
from coordinator.credit.collector import Collected, Collector
from coordinator.credit.ledger import Ledger
from coordinator.credit.members import RunMember
from coordinator.credit.sums import read_sums
from node.credit.answered import PairCounts
from node.host.config import HostConfig
from node.host.credit.host_credit import HostCredit
from node.host.serving.runtime import Runtime, RuntimeConfig
from node.host.serving.service import SERVICE_NAME, ExpertService
from node.limits.limits import Limits
from node.model.experts.block import new_block
from node.rpc.server import NodeServer
from node.trainer.config import TrainConfig
from node.trainer.credit.sender import COUNTERSIGN
from node.trainer.credit.trainer_credit import TrainerCredit
from node.trainer.dispatch.client import ExpertClient
from node.trainer.dispatch.dispatcher import DispatchConfig, Dispatcher
from node.trainer.remote_moe import RemoteMoE
from protocol import expert_pb2 as pb
from protocol.channels import Channels
from protocol.endpoints import Address
from protocol.identity import Identity
from protocol.manifest import all_blocks
from protocol.receipts import CREDIT_SERVICE, pairs_per_token
from protocol.security import Security
from tests.support.swarm_parts import CPU, FakeDirectory, LoopThread, small_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coordinator.credit.sums import CreditSums
    from node.membership.swarm import Swarm

MANIFEST = small_manifest()
BLOCKS = all_blocks(MANIFEST.model)
N_TOKENS = 40
MANY_TOKENS = 1 << 40
ROUND_S = 20.0


class Clock:
    """Seconds since 1970, as all nodes have them."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def swarm_of(identity: Identity, clock: Clock, directory: Directory | None = None) -> Swarm:
    """What credit needs of a node that has joined."""
    dht = SimpleNamespace(now_s=clock)
    security = Security(identity)
    parts = SimpleNamespace(manifest=MANIFEST, identity=identity, security=security, dht=dht, directory=directory)
    return cast("Swarm", parts)


class Directory(FakeDirectory):
    """Replicas of one host, and the host as a peer."""

    def show(self, address: Address) -> None:
        self.table.clear()
        self.add(address.peer_id, address.endpoint, BLOCKS)
        self.host = SimpleNamespace(peer_id=address.peer_id, endpoint=address.endpoint, role="host")

    def peers(self) -> tuple[object, ...]:
        return (self.host,)


class Host:
    """One that serves every block, started again in the same folder with the same key."""

    def __init__(self, loop: LoopThread, clock: Clock, folder: Path) -> None:
        self._loop, self._clock, self._folder = loop, clock, folder
        self.identity = Identity.generate()
        self.address: Address
        self.credit: HostCredit

    def start(self) -> None:
        self._loop.call(self._start())

    async def _start(self) -> None:
        about = pb.DescribeResponse(run_id=MANIFEST.run_id, peer_id=self.identity.peer_id)
        blocks = [new_block(MANIFEST, block_id, CPU) for block_id in BLOCKS]
        self._runtime = Runtime(blocks, MANIFEST, RuntimeConfig())
        service = ExpertService(MANIFEST, self._runtime, CPU, about)
        config = HostConfig(state=self._folder, name="Ada", team="Engines")
        self.credit = HostCredit(config, Limits(), swarm_of(self.identity, self._clock), service.answered)
        handlers = (service.handler(), self.credit.handler())
        names = (SERVICE_NAME, CREDIT_SERVICE)
        self._server = NodeServer(handlers, names, "127.0.0.1", 0, Security(self.identity))
        await self.credit.open()
        self._runtime.start()
        await self._server.start()
        self.address = Address(self.identity.peer_id, self._server.endpoint)

    def stop(self) -> None:
        self._loop.call(self._server.drain(0))
        self._runtime.stop(5)
        self._loop.call(self.credit.close())

    def die(self) -> None:
        """Leave without a word, as a process that is killed."""
        self._loop.call(self._server.drain(0))
        self._runtime.stop(5)
        self.credit._store.close()


class Trainer:
    """One that trains layers of the run over a host's experts."""

    def __init__(self, loop: LoopThread, clock: Clock, directory: Directory, folder: Path) -> None:
        self._loop, self._clock = loop, clock
        self.identity = Identity.generate()
        self.config = TrainConfig(out=folder)
        self.swarm = swarm_of(self.identity, clock, directory)
        loop.call(self._start(directory))

    async def _start(self, directory: Directory) -> None:
        self._client = ExpertClient(self.swarm.security.caller())
        self._dispatcher = Dispatcher(MANIFEST, directory, self._client, DispatchConfig(k_min=0), self._loop.loop)
        self.credit = TrainerCredit(self.config, self.swarm, self._dispatcher)
        server = NodeServer((self.credit.handler(),), (CREDIT_SERVICE,), "127.0.0.1", 0, self.swarm.security)
        self._server = server
        await self.credit.open()
        await server.start()
        self.address = Address(self.identity.peer_id, server.endpoint)

    def train(self, steps: int) -> None:
        """So many steps on N_TOKENS tokens, through every layer."""
        generator = torch.Generator().manual_seed(1)
        layers = [RemoteMoE(self._dispatcher, layer, generator) for layer in range(MANIFEST.model.n_layers)]
        for _ in range(steps):
            x_TD = torch.randn(N_TOKENS, MANIFEST.model.d_model, generator=generator, requires_grad=True)
            for layer in layers:
                x_TD = layer(x_TD)
            x_TD.square().sum().backward()

    def claim(self) -> None:
        """A minute is over; hosts that failed of late are asked too."""
        self.credit._sender._next_s.clear()
        self._loop.call(self.credit._round(ROUND_S), ROUND_S + 10)

    def n_waiting(self) -> int:
        return sum(map(len, self.credit._claims.waiting().values()))

    def stop(self) -> None:
        self._dispatcher.close()
        self._loop.call(self.credit.finish(1.0))
        self._loop.call(self._server.drain(0))
        self._loop.call(self._client.close())


class World:
    """All of them, and somebody who collects."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.loop, self.clock = LoopThread(), Clock()
        stack.callback(self.loop.close)
        self.directory = Directory()
        self.host = Host(self.loop, self.clock, folder / "host")
        self.host.start()
        stack.callback(self.host.stop)
        self.directory.show(self.host.address)
        self.trainers = [Trainer(self.loop, self.clock, self.directory, folder / name) for name in ("one", "two")]
        for trainer in self.trainers:
            stack.callback(trainer.stop)
        self._ledger = Ledger(folder / "credit", MANIFEST.run_id)
        self._ledger.open()
        stack.callback(self._ledger.close)

    def minute(self, *steps: int) -> None:
        """A minute in which each trainer does so many steps, and then claims."""
        for trainer, n in zip(self.trainers, steps, strict=True):
            trainer.train(n)
        self.clock.now_s += 60
        for trainer in self.trainers:
            trainer.claim()

    def collect(self, *, from_trainers: bool = True) -> Collected:
        members = [RunMember(self.host.address, "host", 0)]
        members += [
            RunMember(one.address if from_trainers else replace_endpoint(one.address), "trainer", MANY_TOKENS)
            for one in self.trainers
        ]
        return self.loop.call(self._collect(members))

    async def _collect(self, members: list[RunMember]) -> Collected:
        channels = Channels(Security(Identity.generate()).caller())
        try:
            return await Collector(MANIFEST.run_id, self._ledger, channels, self.clock).collect(members)
        finally:
            await channels.close()

    def sums(self) -> CreditSums:
        return read_sums(self._ledger, MANIFEST.run_id, MANIFEST.model)

    def earned(self) -> PairCounts:
        """What the host has earned by the ledger."""
        (host,) = self.sums().hosts
        return PairCounts(host.forward_pairs, host.backward_pairs)

    def counted(self) -> PairCounts:
        """What the host itself has counted."""
        return self.host.credit.accounts.total()


def replace_endpoint(address: Address) -> Address:
    """As one that nobody can call announces itself."""
    return address._replace(endpoint="")


@contextmanager
def a_world(folder: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(folder, stack)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as made:
        yield made


def pairs_of(steps: int) -> PairCounts:
    """Those of so many steps, both ways."""
    pairs = steps * N_TOKENS * pairs_per_token(MANIFEST.model)
    return PairCounts(pairs, pairs)


def test_totals_are_the_hosts_own_also_over_its_restart(world: World) -> None:
    world.minute(3, 1)
    world.minute(2, 0)
    assert world.collect() == Collected(asked=3, answered=3, new=3, refused=0)
    assert world.earned() == world.counted() == pairs_of(6)

    for trainer in world.trainers:
        trainer.train(2)
    world.host.stop()
    world.clock.now_s += 60
    for trainer in world.trainers:
        trainer.claim()
        assert trainer.n_waiting() == 1
    world.host.start()
    world.directory.show(world.host.address)
    world.minute(1, 4)

    assert [trainer.n_waiting() for trainer in world.trainers] == [0, 0]
    assert world.collect(from_trainers=False).new == 4
    assert world.collect() == Collected(asked=3, answered=3, new=0, refused=0)
    assert world.earned() == world.counted() == pairs_of(15)
    sums = world.sums()
    learnt = {one.peer_id: one.tokens_learnt for one in sums.trainers}
    assert [learnt[one.identity.peer_id] for one in world.trainers] == [8 * N_TOKENS, 7 * N_TOKENS]
    assert (sums.hosts[0].name, sums.hosts[0].team, sums.unseen_receipts) == ("Ada", "Engines", 0)
    assert not any(one.capped for one in sums.trainers)


def test_a_host_that_was_killed_signs_for_what_it_remembers_and_no_more(world: World) -> None:
    world.minute(1, 1)
    world.trainers[0].train(2)
    world.counted()  # written down, as every few seconds
    world.trainers[0].train(3)
    world.host.die()
    world.host.start()
    world.directory.show(world.host.address)
    world.minute(0, 1)
    world.collect()
    assert world.earned() == world.counted() == pairs_of(5)
    assert world.trainers[0].n_waiting() == 0


def test_receipts_are_the_same_from_either_side_and_a_third_collector_finds_the_same_sums(
    world: World, tmp_path: Path
) -> None:
    world.minute(2, 3)
    world.collect(from_trainers=False)
    from_host = world.sums()
    world._ledger.close()
    other = Ledger(tmp_path / "other", MANIFEST.run_id)
    other.open()
    world._ledger = other
    try:
        world.host.address = replace_endpoint(world.host.address)
        assert world.collect() == Collected(asked=2, answered=2, new=2, refused=0)
        assert replace(world.sums(), hosts=(), teams=()) == replace(from_host, hosts=(), teams=())
        assert world.earned() == pairs_of(5)
    finally:
        other.close()


def test_nobody_has_signed_what_another_trained(world: World) -> None:
    one, other = world.trainers
    one.train(1)
    one.credit._claims.make()
    (claims,) = one.credit._claims.waiting().values()
    raw = claims[0].message.SerializeToString()
    with pytest.raises(InvalidInputError, match=r"receipt\.trainer: is .*, not the caller"):
        world.loop.call(other._client.channels.call(world.host.address, COUNTERSIGN, raw, ROUND_S))
    world.clock.now_s += 60
    one.claim()
    world.collect()
    assert world.earned() == pairs_of(1)
