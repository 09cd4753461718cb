"""A node finds its run again although those that it joined through are gone or elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from dht.peer_memory import PeerMemory
from protocol.admission import Admission
from protocol.identity import Identity
from tests.support.dht_nodes import RUN, eventually, running_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from dht.node import DhtNode

GONE = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
IN_RUN = Admission(RUN)


async def until_it_knows(path: Path, *others: DhtNode) -> None:
    async def knows() -> bool:
        if not path.exists():  # noqa: ASYNC240 - a small file
            return False
        return {peer.rpartition("/")[2] for peer in json.loads(path.read_text())["peers"]} >= {  # noqa: ASYNC240
            node.peer_id for node in others
        }

    await eventually(knows)


async def test_a_node_joins_through_those_that_it_knew(tmp_path: Path) -> None:
    memory = tmp_path / "peers.json"
    async with running_nodes() as start_one:
        first = await start_one()
        other = await start_one(first)
        node = await start_one(first, admission=IN_RUN, peers_file=memory, refresh_period_s=0.2)
        await until_it_knows(memory, first, other)
        await node.stop()
        await first.stop()
        again = await start_one(initial_peers=(GONE,), admission=IN_RUN, peers_file=memory)
        assert again.known_peers
        with pytest.raises(UnavailableError, match="initial peers: none answered"):
            await start_one(initial_peers=(GONE,), admission=Admission("another-0123456789ab"), peers_file=memory)


async def test_a_first_peer_that_comes_back_elsewhere_finds_its_nodes(tmp_path: Path) -> None:
    memory, identity = tmp_path / "peers.json", Identity.generate()
    async with running_nodes() as start_one:
        first = await start_one(identity=identity, admission=IN_RUN, peers_file=memory, refresh_period_s=0.2)
        other = await start_one(first)
        await until_it_knows(memory, other)
        await first.stop()
        again = await start_one(identity=identity, admission=IN_RUN, peers_file=memory)
        assert again.addresses != first.addresses

        async def met() -> bool:
            return again.known_peers == other.known_peers == 1

        await eventually(met)


async def test_those_that_are_gone_hold_up_no_first_peer(tmp_path: Path) -> None:
    memory = tmp_path / "peers.json"
    PeerMemory(memory, RUN).save([GONE])
    async with running_nodes() as start_one:
        assert not (await start_one(admission=IN_RUN, peers_file=memory)).known_peers


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"run_id": 1}', '{"run_id": "RUN", "peers": ["/x/p2p/y"]}', "\x00"])
async def test_a_damaged_file_is_no_obstacle(tmp_path: Path, told: str) -> None:
    path = tmp_path / "peers.json"
    path.write_text(told.replace("RUN", RUN))
    async with running_nodes() as start_one:
        assert not (await start_one(admission=IN_RUN, peers_file=path)).known_peers
