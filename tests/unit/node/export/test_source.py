"""Where an export takes the parts of a model from, and what it says when one is not to be had."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import CheckpointError, UnavailableError
from dht.view import PeerInfo
from node.averaging.joining import JoinConfig, fetch_with_word
from node.averaging.pieces import PARAMS
from node.export.source import Checkpoint, PartSource, words_of
from node.model.replica_state import ReplicaState
from node.trainer.exported.layout import parts_of, trunk_tensors
from node.trainer.trunk_replica import trunk_weights
from protocol.manifest import TRUNK, BlockId, all_blocks
from tests.support.exported import HASH, random_model
from tests.support.swarm_parts import FakeDirectory, small_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from node.averaging.partial import PartialReplica
    from protocol.endpoints import Address

MANIFEST = small_manifest(model=HASH)
MODEL = MANIFEST.model


@dataclass
class Trainers(FakeDirectory):
    """A directory with a trainer that tells how much the run has trained."""

    def peers(self) -> tuple[PeerInfo, ...]:
        trainer = PeerInfo(
            peer_id="t",
            role="trainer",
            endpoint="e",
            software="",
            started_s=0.0,
            n_blocks=0,
            tokens_per_s=0.0,
            run_tokens=4096,
            queue_tokens=0,
            expiration_s=2e9,
        )
        return (trainer,)


@dataclass
class Downloads:
    """Sends what `params` has for a block; `failing` replicas break off in the middle so many times."""

    params: dict[BlockId, dict[str, torch.Tensor]]
    failing: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, bool, int]] = field(default_factory=list)

    async def download(
        self, source: Address, block_id: BlockId, wanted: PartialReplica, timeout_s: float
    ) -> ReplicaState:
        self.asked.append((source.peer_id, wanted.params_only, wanted.taken))
        if self.failing.get(source.peer_id, 0):
            self.failing[source.peer_id] -= 1
            wanted.took(wanted.slots[0], source.peer_id)
            raise UnavailableError("the line is cut")
        params = self.params[block_id]
        assert {f"{PARAMS}{name}": tuple(t.shape) for name, t in params.items()} == {
            t.name: t.shape for t in wanted.tensors
        }
        wanted.senders.add(source.peer_id)
        n_rows = len(next(iter(params.values())))
        counters = {"steps_R": torch.zeros(n_rows, dtype=torch.int64), "learnt_R": torch.zeros(n_rows).double()}
        return ReplicaState(params=params, first={}, second={}, version=9, **counters)


def replicas_of_everything(*peers: str) -> Trainers:
    directory = Trainers()
    for peer in peers:
        directory.add(peer, "127.0.0.1:1", [TRUNK, *all_blocks(MODEL)])
    return directory


def downloads() -> tuple[Downloads, dict[BlockId, dict[str, torch.Tensor]]]:
    model, experts = random_model(MANIFEST)
    learnt = {t.name.removeprefix(PARAMS) for t in trunk_weights(model)}
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {TRUNK: {name: places[name].detach()[None].clone() for name in learnt}}
    params |= {block.id: block.params for of_layer in experts.blocks.values() for block in of_layer}
    wanted = {TRUNK: trunk_tensors(model)}
    return Downloads(params), wanted


async def test_the_trunk_comes_with_what_the_runs_seed_drew() -> None:
    client, wanted = downloads()
    source = PartSource(MANIFEST, replicas_of_everything("a", "b"), client, wait_s=0)
    tensors, taken = await source.fetch_trunk()
    assert tensors.keys() == wanted[TRUNK].keys()
    assert all(torch.equal(tensors[name], t) for name, t in wanted[TRUNK].items())
    assert (taken.version, taken.word, taken.run_tokens) == (9, "two replicas", 4096)
    assert all(params_only for _, params_only, _ in client.asked)


async def test_a_block_of_one_replica_is_taken_on_its_word() -> None:
    client, _ = downloads()
    source = PartSource(MANIFEST, replicas_of_everything("a"), client, wait_s=0)
    part = parts_of(MANIFEST)[6]
    assert part.id == BlockId(1, 1)
    tensors, taken = await source.fetch_block(BlockId(1, 1), part.tensors)
    assert torch.equal(tensors["layers.1.moe.experts.1.w_in"], client.params[BlockId(1, 1)]["w_in"])
    assert set(tensors) == {tensor.name for tensor in part.tensors}
    assert (taken.word, taken.run_tokens) == ("one replica", 0)


async def test_a_download_that_broke_off_begins_anew_so_that_all_of_it_is_of_one_moment() -> None:
    client, _ = downloads()
    client.failing = {"a": 1, "b": 1}
    replicas = replicas_of_everything("a", "b").replicas(BlockId(0, 0))
    config = JoinConfig(max_distance=0.5, weights_only=True)
    wanted = [*parts_of(MANIFEST)[1].tensors]
    named = [t._replace(name=f"{PARAMS}{t.name.rpartition('.')[2]}") for t in wanted]
    with pytest.raises(UnavailableError):
        await fetch_with_word(client, replicas, named, config, random.Random(0))
    fetched = await fetch_with_word(client, replicas, named, config, random.Random(0))
    assert fetched.is_corroborated
    assert [taken for _, _, taken in client.asked] == [0, 0, 0, 0]


async def test_a_replica_that_fails_is_asked_again_while_there_is_time() -> None:
    client, _ = downloads()
    client.failing = {"a": 1}
    source = PartSource(MANIFEST, replicas_of_everything("a"), client, wait_s=30)
    await source.fetch_block(BlockId(0, 0), parts_of(MANIFEST)[1].tensors)
    client.failing = {"a": 10**6}
    source = PartSource(MANIFEST, replicas_of_everything("a"), client, wait_s=0)
    with pytest.raises(UnavailableError, match="block 0/0: none of 1 replicas could be downloaded"):
        await source.fetch_block(BlockId(0, 0), parts_of(MANIFEST)[1].tensors)


async def test_experts_without_a_replica_are_waited_for_and_named() -> None:
    client, _ = downloads()
    directory = replicas_of_everything("a")
    for gone in (BlockId(0, 1), BlockId(0, 2), BlockId(1, 0), TRUNK):
        del directory.table[gone]
    ids = [TRUNK, *all_blocks(MODEL)]
    words = (
        "the trunk, experts 4 to 11 of layer 0, experts 0 to 3 of layer 1 have no live replica after a wait of 0 s: "
    )
    remedy = "start hosts for this run, look at it with `status`, and try again; the trunk comes from a live trainer"
    with pytest.raises(UnavailableError, match=re.escape(words + remedy)):
        await PartSource(MANIFEST, directory, client, wait_s=0).wait_for(ids)
    waiting = asyncio.create_task(PartSource(MANIFEST, directory, client, wait_s=30).wait_for(ids))
    await asyncio.sleep(0)
    directory.add("b", "127.0.0.1:2", ids)
    await waiting


def test_many_places_are_counted() -> None:
    blocks = [BlockId(layer, 0) for layer in range(9)]
    assert words_of(blocks, MODEL).endswith("experts 0 to 3 of layer 4, 4 more places")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trunk checkpoint in"):
        Checkpoint(tmp_path).read(MANIFEST)
