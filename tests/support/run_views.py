"""Views of a run as its directory would have them: a small one, one with replicas and trainers, a very large one."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coordinator.blocks import split_blocks
from dht.view import DirectoryView, PeerInfo, Replica, Reported
from protocol.manifest import TRUNK, BlockId, Manifest, ModelConfig, all_blocks
from protocol.reports import TrainerReport
from tests.support.trainer_events import PEERS

if TYPE_CHECKING:
    from protocol.announcements import ReplicaState, Role

MANIFEST = Manifest(name="demo", model=ModelConfig())


def replica(
    block: BlockId, peer: int, version: int, *, state: ReplicaState = "serving", divergence: float = 0.0
) -> Replica:
    return Replica(
        block=block,
        peer_id=PEERS[peer],
        endpoint=f"127.0.0.1:{40000 + peer}",
        version=version,
        queue_tokens=10,
        tokens_per_s=100.5,
        tokens_total=5,
        n_experts=0 if block == TRUNK else 32,
        expiration_s=2000.0,
        state=state,
        divergence=divergence,
    )


def peer_info(index: int, role: Role = "host", n_blocks: int = 8) -> PeerInfo:
    return PeerInfo(
        peer_id=PEERS[index],
        role=role,
        endpoint=f"127.0.0.1:{40000 + index}" if role == "host" else "",
        software="kilohive/0",
        started_s=900.0,
        n_blocks=n_blocks,
        tokens_per_s=1320.4,
        run_tokens=7,
        queue_tokens=2048,
        expiration_s=2000.0,
        own_tokens=61_440 if role == "trainer" else 0,
        staleness=3.25,
        exchanged_bytes=12_345_678,
    )


def view(dead: frozenset[int] = frozenset(), n_more_peers: int = 0) -> DirectoryView:
    replicas: dict[BlockId, tuple[Replica, ...]] = dict.fromkeys(all_blocks(MANIFEST.model), ())
    for index, share in enumerate(split_blocks(MANIFEST.model, 4)):
        for block in share if index not in dead else ():
            replicas[block] = (replica(block, index, 100 + index),)
    hosts = [peer_info(i) for i in range(4) if i not in dead]
    others = [peer_info(5, "trainer", 0), peer_info(6, "coordinator", 0)]
    more = [peer_info(10 + i, "trainer", 0) for i in range(n_more_peers)]
    return DirectoryView(taken_s=1000.0, replicas=MappingProxyType(replicas), peers=(*hosts, *others, *more))


def averaged() -> DirectoryView:
    """Six hosts with two replicas of each block, a third of one on its way, and two trainers."""
    replicas: dict[BlockId, tuple[Replica, ...]] = dict.fromkeys(all_blocks(MANIFEST.model), ())
    for index, share in enumerate(split_blocks(MANIFEST.model, 6, 2)):
        for block in share:
            found = replica(block, index, 1000 + 7 * index, divergence=0.01 * index)
            replicas[block] = (*replicas[block], found)
    return DirectoryView(
        taken_s=1000.0,
        replicas=MappingProxyType(replicas),
        others=(replica(BlockId(0, 3), 5, 3, state="joining"), replica(BlockId(1, 7), 2, 9, state="stored")),
        trunk=(replica(TRUNK, 20, 400, divergence=0.0023), replica(TRUNK, 21, 397)),
        peers=(*(peer_info(i) for i in range(6)), *(peer_info(i, "trainer", 0) for i in (20, 21, 22))),
    )


def reported(peer: int, **changes: Any) -> Reported:
    """What the trainer of that number measured, in a run of two layers."""
    said = TrainerReport(
        step=20,
        run_tokens=40_960,
        train_bits_per_byte=3.5,
        tokens_per_s=5000.0,
        staleness=1.5,
        calls_ok=320,
        calls_failed=2,
        wire_bytes=84_000_000,
        load_entropy_bits=(8.0, 8.5),
        load_cv=(0.25, 0.75),
        dead_experts=(2, 10),
        evaluated_tokens=(0, 20_480),
        held_out_bits_per_byte=(8.0, 4.0),
    )
    return Reported(peer_id=PEERS[peer], said=replace(said, **changes), expiration_s=2000.0)


CROWD = Manifest(name="crowd", model=ModelConfig(n_layers=20, experts_per_layer=8000, experts_per_block=8))
"""20,000 blocks."""


def crowd_id(index: int) -> str:
    """A peer id as long as any."""
    return f"12D3KooW{index:044}"


def crowd(n_peers: int = 10_000, manifest: Manifest = CROWD) -> DirectoryView:
    """So many peers, a tenth of them trainers that report, and two replicas of each block."""
    n_layers, n_trainers = manifest.model.n_layers, n_peers // 10
    hosts = [replace(peer_info(0), peer_id=crowd_id(index)) for index in range(n_trainers, n_peers)]
    trainers = [replace(peer_info(0, "trainer", 0), peer_id=crowd_id(index)) for index in range(n_trainers)]
    replicas = {
        block: tuple(
            replace(replica(block, 0, number), peer_id=hosts[(2 * number + copy) % len(hosts)].peer_id)
            for copy in range(2)
        )
        for number, block in enumerate(all_blocks(manifest.model))
    }
    by_layer = {
        "load_entropy_bits": (12.5,) * n_layers,
        "load_cv": (0.5,) * n_layers,
        "dead_experts": (3,) * n_layers,
        "evaluated_tokens": tuple(range(0, 64_000, 1000)),
        "held_out_bits_per_byte": tuple(8.0 - 0.01 * number for number in range(64)),
    }
    return DirectoryView(
        taken_s=1000.0,
        replicas=MappingProxyType(replicas),
        peers=(*trainers, *hosts),
        reports=tuple(replace(reported(0, **by_layer), peer_id=trainer.peer_id) for trainer in trainers),
    )
