"""Trainers' trunks over real gRPC: two that train on different text become one; a newcomer takes over what is there."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.errors import TooFewExpertsError, UnavailableError
from common.events import EventLog
from dht.view import DirectoryView, Replica
from node.averaging.events import ExchangeEvent
from node.averaging.gossip import relative_distance
from node.data import open_dataset
from node.model.moe import LocalExperts
from node.model.replica_state import ReplicaState
from node.trainer.config import TrainConfig
from node.trainer.train_step import StepConfig, Training, build_model
from node.trainer.trunk_replica import TrunkReplica
from node.trainer.trunk_sharing import TrunkSharing
from protocol.manifest import TRUNK, AveragingConfig, BlockId
from protocol.security import Security
from tests.support.swarm_parts import make_replica, small_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from node.data import TextDataset

MANIFEST = small_manifest(
    optimizer={"lr": 1e-2, "total_tokens": 20_000}, averaging=AveragingConfig(period_s=0.05, clip_radius=2.0)
)
HANG_S = 30.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Ant number {n} carries leaf {n % 7}." for n in range(900)))
    return open_dataset(text, cache_dir=folder / "cache", seed=0)


@dataclass
class TrunkDirectory:
    """Says at once what every trainer of a test says of its trunk; `dead` are records of trainers that are gone."""

    trainers: dict[str, Trainer] = field(default_factory=dict)
    dead: tuple[Replica, ...] = ()
    looks: int = 0

    def replicas(self, block: BlockId) -> tuple[Replica, ...]:
        said = [(peer_id, trainer.sharing.record()) for peer_id, trainer in self.trainers.items()]
        live = (
            replace(make_replica(TRUNK, peer_id, record.endpoint), version=record.version) for peer_id, record in said
        )
        return (*live, *self.dead) if block == TRUNK else ()

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        return DirectoryView(trunk=self.replicas(TRUNK))

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Records of the dead expire after the second look."""
        await asyncio.sleep(min(timeout_s, 0.01))
        self.looks += 1
        if self.looks == 2:
            self.dead = ()
        return True


@dataclass(frozen=True)
class _Identity:
    peer_id: str


@dataclass(frozen=True)
class _Swarm:
    identity: _Identity
    directory: TrunkDirectory
    manifest: Any = MANIFEST
    listen: str = "127.0.0.1"

    @property
    def security(self) -> Security:
        named: Any = self.identity
        return Security(named, insecure_local=True)


class KnownPlace:
    """A trainer that others can call where it listens."""

    endpoint = ""

    async def settle(self, endpoint: str) -> None:
        self.endpoint = endpoint

    async def close(self) -> None:
        """Nothing was opened."""


@dataclass
class Trainer:
    training: Training
    sharing: TrunkSharing
    exchanges: list[ExchangeEvent]

    async def steps(self, n: int) -> None:
        for _ in range(n):
            await asyncio.to_thread(self.training.step)

    async def state(self) -> ReplicaState:
        return await asyncio.wait_for(asyncio.wrap_future(self.sharing.replica.call(ReplicaState.copy)), HANG_S)

    async def exchange(self) -> None:
        result = await self.sharing.averaging.averager.exchange_once()
        assert result is not None
        assert (result.problem, [moved.block for moved in result.blocks]) == ("", [TRUNK])


def give_up(error: TooFewExpertsError) -> None:
    raise error


def new_training(dataset: TextDataset, shard: int, seed: int) -> Training:
    generator, experts = torch.Generator().manual_seed(seed), LocalExperts(MANIFEST)
    model = build_model(MANIFEST, experts, generator)
    config = StepConfig(batch=4, micro_batches=1, shard=shard, n_shards=2)
    return Training(MANIFEST, model, experts, dataset, config, give_up)


@asynccontextmanager
async def trainer(
    dataset: TextDataset,
    directory: TrunkDirectory,
    peer_id: str,
    *,
    shard: int = 0,
    seed: int = 1,
    join_timeout_s: float = HANG_S,
) -> AsyncIterator[Trainer]:
    """A trainer as its command wires it, less the DHT; announced once it has joined."""
    training, events, told = new_training(dataset, shard, seed), EventLog(), list[ExchangeEvent]()
    events.subscribe(lambda event, _t_s: told.append(event) if isinstance(event, ExchangeEvent) else None)
    swarm: Any = _Swarm(_Identity(peer_id), directory)
    sharing = TrunkSharing(TrainConfig(join_timeout_s=join_timeout_s), swarm, training, events, KnownPlace())
    try:
        await asyncio.wait_for(sharing.join(), HANG_S)
        directory.trainers[peer_id] = Trainer(training, sharing, told)
        yield directory.trainers[peer_id]
    finally:
        directory.trainers.pop(peer_id, None)
        await sharing.stop()
        training.close()


async def distance(one: Trainer, other: Trainer) -> float:
    return distance_between(await one.state(), await other.state())


def distance_between(one: ReplicaState, other: ReplicaState) -> float:
    return relative_distance({name: other.params[name] - p for name, p in one.params.items()}, one.params)


async def distance_of_strangers(dataset: TextDataset, n_steps: int) -> float:
    """How far two trunks come apart that never exchange."""
    states = []
    for shard in (0, 1):
        training = new_training(dataset, shard, 1)
        for _ in range(n_steps):
            await asyncio.to_thread(training.step)
        states.append(await asyncio.wrap_future(TrunkReplica(training).call(ReplicaState.copy)))
        training.close()
    return distance_between(*states)


def assert_same(states: Sequence[ReplicaState]) -> None:
    one, other = (state.named() for state in states)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


async def test_two_trunks_that_learnt_apart_meet_at_the_mean_of_what_they_learnt(dataset: TextDataset) -> None:
    directory = TrunkDirectory()
    async with (
        trainer(dataset, directory, "peer-a", shard=0) as a,
        trainer(dataset, directory, "peer-b", shard=1) as b,
    ):
        assert await distance(a, b) == 0.0  # one seed
        assert a.sharing.rate_scale() == 1.0, "a trainer alone"
        await a.steps(6)
        await b.steps(2)
        before_a, before_b = await a.state(), await b.state()
        assert await distance(a, b) > 1e-3
        await a.exchange()
        after_a, after_b = await a.state(), await b.state()
        assert_same([after_a, after_b])
        for name, tensor in before_a.params.items():  # a has learnt from three times as many tokens
            torch.testing.assert_close(
                after_a.params[name], 0.75 * tensor + 0.25 * before_b.params[name], rtol=1e-4, atol=1e-6
            )
        assert after_a.version == after_b.version == 6
        assert after_a.steps_R.tolist() == after_b.steps_R.tolist() == [6]
        assert (a.training.steps_done, b.training.steps_done) == (6, 2)
        for one in (a, b):  # 3 parts and 1 part are as good as 1.6 alike
            assert one.sharing.rate_scale() == pytest.approx(1.6**0.5)
        assert a.sharing.record().divergence > 1e-3


async def test_trunks_that_train_all_the_while_stay_together(dataset: TextDataset) -> None:
    """Steps, evaluations and exchanges of both go on at once; every exchange that is begun must come out whole."""
    apart = await distance_of_strangers(dataset, n_steps=20)
    directory = TrunkDirectory()
    async with trainer(dataset, directory, "peer-a") as one, trainer(dataset, directory, "peer-b", shard=1) as other:
        for _ in range(10):
            await asyncio.wait_for(asyncio.gather(one.steps(2), other.steps(2), one.exchange()), HANG_S)
        assert await asyncio.to_thread(one.training.evaluate, 500) > 0
        assert await distance(one, other) < apart / 2
        await other.steps(1)  # a pair that has just met has nothing to tell
        await other.exchange()
        assert await distance(one, other) < 1e-6
        assert all(torch.isfinite(t).all() for t in (await one.state()).named().values())
        assert [sum(told.dialled for told in exchanges) for exchanges in (one.exchanges, other.exchanges)] == [10, 1]
        assert not any(told.problem for told in one.exchanges + other.exchanges)


async def test_the_loop_itself_averages_once_started(dataset: TextDataset) -> None:
    directory = TrunkDirectory()
    async with trainer(dataset, directory, "peer-a") as a, trainer(dataset, directory, "peer-b", shard=1) as b:
        await a.steps(2)
        await asyncio.wait_for(asyncio.gather(a.sharing.catch_up(), b.sharing.catch_up()), HANG_S)
        async with asyncio.timeout(HANG_S):
            while sum(bool(told.blocks) for told in a.exchanges) < 3:
                await a.steps(1)
        assert a.sharing.averaging.averager.exchanged_bytes > 0


async def test_a_newcomer_downloads_the_trunk_before_it_is_announced_and_then_catches_up(dataset: TextDataset) -> None:
    directory = TrunkDirectory()
    async with trainer(dataset, directory, "peer-a") as old:
        await old.steps(5)
        async with trainer(dataset, directory, "peer-b", shard=1, seed=77) as young:
            assert_same([await old.state(), await young.state()])
            assert young.sharing.record().version == 5
            assert young.training.own_tokens == 0
            await old.steps(3)
            before = await old.state()
            await asyncio.wait_for(young.sharing.catch_up(), HANG_S)
            assert_same([before, await young.state()])  # who has learnt nothing moves all the way
            assert_same([before, await old.state()])
            assert (await young.state()).version == 8


async def test_a_newcomer_that_can_download_from_nobody_does_not_start_from_scratch(dataset: TextDataset) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = make_replica(TRUNK, "gone", f"127.0.0.1:{unused.getsockname()[1]}")
        directory = TrunkDirectory(dead=(replace(gone, version=9),), looks=3)
        with pytest.raises(UnavailableError, match=r"could not be downloaded from its 1 other .* or stop them and try"):
            async with trainer(dataset, directory, "peer-a", join_timeout_s=0.0):
                pass


async def test_a_newcomer_waits_until_the_record_of_a_trainer_that_died_expires(dataset: TextDataset) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = make_replica(TRUNK, "gone", f"127.0.0.1:{unused.getsockname()[1]}")
        directory = TrunkDirectory(dead=(replace(gone, version=9),))
        async with trainer(dataset, directory, "peer-a") as alone:
            assert directory.looks == 2
            assert alone.sharing.record().version == 0
            assert await alone.sharing.averaging.averager.exchange_once() is None


async def test_a_resumed_trunk_that_is_ahead_is_kept(dataset: TextDataset) -> None:
    directory = TrunkDirectory()
    async with trainer(dataset, directory, "peer-a") as behind:
        await behind.steps(1)
        training = new_training(dataset, 1, 3)
        for _ in range(2):
            training.step()
        swarm: Any = _Swarm(_Identity("peer-b"), directory)
        sharing = TrunkSharing(TrainConfig(), swarm, training, EventLog(), KnownPlace())
        try:
            before = await asyncio.wrap_future(sharing.replica.call(ReplicaState.copy))
            await asyncio.wait_for(sharing.join(), HANG_S)
            assert_same([before, await asyncio.wrap_future(sharing.replica.call(ReplicaState.copy))])
        finally:
            await sharing.stop()
            training.close()
