"""Real DHT nodes on loopback (p2pd processes, hivemind's protocol, our records): storing, finding, joining."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from dht.announcer import Announcement, Announcer
from dht.directory import Directory
from dht.join import fetch_manifest, publish_manifest
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord
from protocol.identity import Identity
from protocol.manifest import BlockId
from tests.support.dht_nodes import KEY, MANIFEST, MODEL, RUN, Start, cut_power, entry_by, eventually
from tests.support.views import live_blocks

if TYPE_CHECKING:
    from dht.node import DhtNode

OPEN_RUN = Admission(RUN)


async def test_a_record_stored_by_one_node_is_read_by_every_other(start: Start) -> None:
    first = await start()
    nodes = [first, await start(first), await start(first)]
    entry = entry_by(Identity.generate())
    assert await nodes[1].store(entry.key, entry.value, entry.expiration_s, entry.subkey)
    for node in nodes:
        assert await node.get_many([KEY, f"{RUN}/0/0"]) == {KEY: {entry.subkey: entry.value}, f"{RUN}/0/0": {}}


async def test_owners_under_one_key_do_not_hide_each_other(start: Start) -> None:
    first = await start()
    second = await start(first)
    entries = [entry_by(Identity.generate()) for _ in range(6)]
    assert await first.store_many(entries[:3]) == (True, True, True)
    assert await second.store_many(entries[3:]) == (True, True, True)
    third = await start(second)
    assert (await third.get_many([KEY]))[KEY] == {entry.subkey: entry.value for entry in entries}


async def test_a_newer_record_replaces_an_older_one_everywhere_and_at_once(start: Start) -> None:
    first = await start()
    nodes = [first, await start(first), await start(first)]
    owner = Identity.generate()
    for version in range(1, 5):
        entry = entry_by(owner, version=version)
        assert await nodes[0].store_many([entry]) == (True,)
        for node in nodes:
            assert (await node.get_many([KEY]))[KEY] == {owner.peer_id: entry.value}


async def test_a_node_has_the_peer_id_of_its_key_and_listens_where_it_says(start: Start) -> None:
    identity = Identity.generate()
    node = await start(identity=identity)
    (address,) = node.addresses
    assert node.peer_id == identity.peer_id
    assert address.endswith(f"/p2p/{identity.peer_id}")
    host, port = address.split("/")[2], int(address.split("/")[4])
    with socket.create_connection((host, port), timeout=5.0):
        pass


async def test_an_expired_record_is_gone_and_is_not_taken(start: Start) -> None:
    first = await start()
    second = await start(first)
    short = entry_by(Identity.generate(), ttl_s=0.7)
    assert await first.store_many([short]) == (True,)
    assert short.subkey in (await second.get_many([KEY]))[KEY]
    await asyncio.sleep(max(0.0, short.expiration_s - time.time()))
    assert (await second.get_many([KEY]))[KEY] == {}
    assert await first.store_many([short]) == (False,)


async def test_a_node_joins_through_another_when_the_first_has_died(start: Start) -> None:
    first = await start()
    second, third = await start(first), await start(first)
    entry = entry_by(Identity.generate())
    await second.store_many([entry])
    cut_power(first)
    newcomer = await start(first, third)
    assert (await newcomer.get_many([KEY]))[KEY] == {entry.subkey: entry.value}
    another = entry_by(Identity.generate())
    assert await newcomer.store_many([another]) == (True,)
    assert (await second.get_many([KEY]))[KEY].keys() == {entry.subkey, another.subkey}


async def test_nodes_that_lost_each_other_meet_again(start: Start) -> None:
    first = await start(refresh_period_s=0.2)
    second = await start(first, refresh_period_s=0.2)
    for node in (first, second):
        table = node._parts.node.protocol.routing_table
        for node_id in list(table.uid_to_peer_id):
            del table[node_id]
        assert node.known_peers == 0

    async def met() -> bool:
        return first.known_peers == second.known_peers == 1

    await eventually(met)


def announcer_of(node: DhtNode, identity: Identity, *blocks: BlockId, admission: Admission = OPEN_RUN) -> Announcer:
    said = tuple(BlockRecord(block=block, version=1, endpoint="127.0.0.1:4000", n_experts=4) for block in blocks)
    announcement = Announcement(peer=PeerRecord(role="host", endpoint="127.0.0.1:4000"), blocks=said)
    return Announcer(node, identity, admission, describe=lambda: announcement, period_s=0.2, ttl_s=1.5)


async def test_the_directory_sees_a_replica_come_and_go(start: Start) -> None:
    first = await start()
    identity = Identity.generate()
    host, trainer = await start(first, identity=identity), await start(first)
    directory = Directory(trainer, RUN, MODEL, refresh_s=0.1)
    await directory.start()
    announcer = announcer_of(host, identity, BlockId(0, 0), BlockId(0, 1))
    await announcer.start()
    assert await directory.wait_for_change(10.0, since=0)
    assert directory.snapshot().lost_blocks() == ()
    assert [peer.peer_id for peer in directory.peers()] == [identity.peer_id]
    seen = directory.generation
    await announcer.withdraw()
    assert await directory.wait_for_change(10.0, since=seen)
    assert live_blocks(directory.snapshot()) == ()
    await directory.stop()


async def test_the_directory_of_a_closed_run_does_not_show_who_was_not_invited(start: Start) -> None:
    run, member, stranger = Admission(RUN, bytes(range(32))), Identity.generate(), Identity.generate()
    first = await start(admission=run)
    host = await start(first, admission=run, identity=member)
    reader, lax = await start(first, admission=run), await start(first, identity=stranger)
    await announcer_of(host, member, BlockId(0, 0), admission=run).announce_now()
    for admission in (Admission(RUN), Admission(RUN, bytes(32))):
        # His own node keeps what he says; those of the run refuse it.
        await announcer_of(lax, stranger, BlockId(0, 1), admission=admission).announce_now()
        seen, shown = Directory(reader, RUN, MODEL), Directory(lax, RUN, MODEL)
        await seen.refresh_now()
        await shown.refresh_now()
        assert [peer.peer_id for peer in seen.peers()] == [member.peer_id]
        assert live_blocks(seen.snapshot()) == (BlockId(0, 0),)
        assert {peer.peer_id for peer in shown.peers()} == {member.peer_id, stranger.peer_id}
        assert seen.asks_for_tickets


async def test_the_directory_drops_a_host_that_died_without_a_word(start: Start) -> None:
    first = await start()
    identity = Identity.generate()
    host, trainer = await start(first, identity=identity), await start(first)
    directory = Directory(trainer, RUN, MODEL, refresh_s=0.1)
    await directory.start()
    announcer = announcer_of(host, identity, BlockId(0, 0))
    await announcer.start()
    assert await directory.wait_for_change(10.0, since=0)
    await asyncio.sleep(2.0)  # longer than a record lives: it is renewed
    assert directory.replicas(BlockId(0, 0))
    seen = directory.generation
    await announcer.stop()
    cut_power(host)
    assert await directory.wait_for_change(10.0, since=seen)
    assert live_blocks(directory.snapshot()) == ()
    await directory.stop()


async def test_a_manifest_is_found_after_its_owner_has_gone(start: Start) -> None:
    owner = Identity.generate()
    manifest = replace(MANIFEST, owner=owner.peer_id)
    coordinator = await start(identity=owner)
    await publish_manifest(coordinator, owner, manifest)
    host = await start(coordinator, keep_period_s=0.2)
    assert await fetch_manifest(host, manifest.run_id, 10.0) == manifest
    other = await start(host)
    await coordinator.stop()
    newcomer = await start(other)
    assert await fetch_manifest(newcomer, manifest.run_id, 10.0) == manifest


async def test_asking_for_nothing_and_storing_nothing_is_fine(start: Start) -> None:
    node = await start()
    assert await node.get_many([]) == {}
    assert await node.store_many([]) == ()
