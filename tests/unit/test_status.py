"""The tables of `status`, from views of the directory."""

from __future__ import annotations

import io
import json
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from coordinator.blocks import split_blocks
from coordinator.status import MAX_PEERS_SHOWN, render_status, status_json
from dht.view import DirectoryView, PeerInfo, Replica
from protocol.manifest import BlockId, Manifest, ModelConfig, all_blocks
from tests.support.trainer_events import PEERS

if TYPE_CHECKING:
    from protocol.announcements import Role

MANIFEST = Manifest(name="demo", model=ModelConfig())


def replica(block: BlockId, peer: int, version: int) -> Replica:
    return Replica(
        block=block,
        peer_id=PEERS[peer],
        endpoint=f"127.0.0.1:{40000 + peer}",
        version=version,
        queue_tokens=10,
        tokens_per_s=100.5,
        tokens_total=5,
        n_experts=32,
        expiration_s=2000.0,
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


def shown(taken: DirectoryView, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(render_status(MANIFEST, taken))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 120])
def test_a_whole_swarm(width: int) -> None:
    lines = shown(view(), width).splitlines()
    assert lines[0] == f"run {MANIFEST.run_id}"
    host = next(line for line in lines if "…3VdZ01" in line)
    assert host.split() == ["…3VdZ01", "host", "127.0.0.1:40001", "0/4-7,1/4-7", "1,320", "2,048", "1:40"]
    layer = next(line for line in lines if line.strip().startswith("0 "))
    assert layer.split() == ["0", "16", "of", "16", "1" * 16, "100", "to", "103", "4", "40"]
    assert "all 32 blocks have a live replica" in lines[-1]


def test_lost_blocks_are_counted_and_named() -> None:
    text = shown(view(dead=frozenset({2})))
    assert "8 of 32 blocks have no live replica: 0/8-11,1/8-11" in text
    assert "12 of 16" in text
    assert "1111111100001111" in text


def test_an_empty_swarm_says_so() -> None:
    empty = DirectoryView(taken_s=1000.0, replicas=MappingProxyType(dict.fromkeys(all_blocks(MANIFEST.model), ())))
    text = shown(empty)
    assert "no peer is announced" in text
    assert "32 of 32 blocks have no live replica: 0/0-15,1/0-15" in text


def test_many_replicas_and_many_peers_stay_readable() -> None:
    block = BlockId(0, 0)
    crowded = {**view().replicas, block: tuple(replica(block, i, 1) for i in range(12))}
    taken = view(n_more_peers=MAX_PEERS_SHOWN)
    text = shown(DirectoryView(taken_s=1000.0, replicas=MappingProxyType(crowded), peers=taken.peers))
    assert "+111" in text
    assert "and 6 more peers" in text


def test_json_holds_everything_and_is_json() -> None:
    taken = view(dead=frozenset({2}))
    table = json.loads(json.dumps(status_json(MANIFEST, taken)))
    assert table["run_id"] == MANIFEST.run_id
    assert table["blocks"] == 32
    assert table["blocks_lost"] == [f"{layer}/{block}" for layer in range(2) for block in range(8, 12)]
    assert len(table["replicas"]) == 24
    assert table["replicas"][0]["block"] == "0/0"
    assert {peer["role"] for peer in table["peers"]} == {"host", "trainer", "coordinator"}
