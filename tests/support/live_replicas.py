"""A run whose live replicas send what a test gives them, without a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from common.errors import UnavailableError
from dht.view import PeerInfo
from node.averaging.live_replicas import LiveReplicas
from node.averaging.pieces import PARAMS
from node.model.replica_state import ReplicaState
from node.trainer.exported.layout import trunk_tensors
from node.trainer.trunk_replica import trunk_weights
from protocol.manifest import TRUNK, BlockId, all_blocks
from tests.support.exported import HASH, random_model
from tests.support.swarm_parts import FakeDirectory, small_manifest

if TYPE_CHECKING:
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


def downloads() -> tuple[Downloads, dict[str, torch.Tensor]]:
    """Whoever sends a model of random weights, and its trunk's tensors."""
    model, experts = random_model(MANIFEST)
    learnt = {t.name.removeprefix(PARAMS) for t in trunk_weights(model)}
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {TRUNK: {name: places[name].detach()[None].clone() for name in learnt}}
    params |= {block.id: block.params for of_layer in experts.blocks.values() for block in of_layer}
    return Downloads(params), trunk_tensors(model)


def live(directory: Trainers, client: Downloads, wait_s: float = 0) -> LiveReplicas:
    return LiveReplicas(MANIFEST, directory, client, wait_s, "--trunk")
