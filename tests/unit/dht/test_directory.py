"""The directory, on a DHT in memory whose clock the test moves."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from dht.announcer import Announcer
from dht.directory import MAX_AVOID_S, Directory
from dht.record_versions import PERIOD_S, TTL_S
from dht.view import PeerLoad
from protocol.admission import Admission
from protocol.identity import Identity
from protocol.manifest import BlockId, all_blocks
from protocol.records import MAX_ANNOUNCE_TTL_S, block_key
from tests.support.announcing import FIRST, MODEL, RUN, Host, entry_of
from tests.support.fake_dht import START_S, FakeDht
from tests.support.views import live_blocks

if TYPE_CHECKING:
    from dht.view import DirectoryView


@pytest.fixture
def dht() -> FakeDht:
    return FakeDht()


@pytest.fixture
def directory(dht: FakeDht) -> Directory:
    return Directory(dht, RUN, MODEL)


async def test_an_empty_swarm_has_every_block_lost(directory: Directory) -> None:
    await directory.refresh_now()
    view = directory.snapshot()
    assert live_blocks(view) == ()
    assert view.lost_blocks() == tuple(all_blocks(MODEL))
    assert view.peers == ()
    assert directory.generation == 0


async def test_what_is_announced_is_found(dht: FakeDht, directory: Directory) -> None:
    host, other = Host(dht, FIRST, BlockId(1, 2)), Host(dht, FIRST, port=4001)
    host.steps = 7
    assert await host.announcer.announce_now()
    assert await other.announcer.announce_now()
    await directory.refresh_now()
    assert {replica.peer_id for replica in directory.replicas(FIRST)} == {host.peer_id, other.peer_id}
    (replica,) = directory.replicas(BlockId(1, 2))
    assert (replica.endpoint, replica.version, replica.queue_tokens, replica.n_experts) == ("127.0.0.1:4000", 7, 10, 2)
    assert replica.expiration_s == START_S + TTL_S
    assert [peer.role for peer in directory.peers()] == ["host", "host"]
    assert directory.snapshot().load_by_peer()[host.peer_id] == PeerLoad(n_blocks=2, queue_tokens=10, tokens_per_s=2.5)
    assert live_blocks(directory.snapshot()) == (FIRST, BlockId(1, 2))


async def test_one_lookup_serves_all_keys(dht: FakeDht, directory: Directory) -> None:
    await directory.refresh_now()
    assert dht.calls == 1
    for block in all_blocks(MODEL):
        directory.replicas(block)
    assert dht.calls == 1


async def test_a_host_that_falls_silent_is_gone_when_its_records_expire(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    await directory.refresh_now()
    dht.time_s += TTL_S - 0.1
    assert directory.replicas(FIRST)
    dht.time_s += 0.1
    assert not directory.replicas(FIRST)  # before any refresh
    assert not directory.peers()
    generation = directory.generation
    await directory.refresh_now()
    assert directory.generation == generation + 1
    assert FIRST in directory.snapshot().lost_blocks()


async def test_a_dht_that_is_down_leaves_what_is_known_until_it_expires(dht: FakeDht, directory: Directory) -> None:
    await Host(dht, FIRST).announcer.announce_now()
    await directory.refresh_now()
    dht.down = True
    with pytest.raises(UnavailableError):
        await directory.refresh_now()
    assert directory.replicas(FIRST)
    dht.time_s += TTL_S
    with pytest.raises(UnavailableError):
        await directory.refresh_now()
    assert not directory.replicas(FIRST)
    assert directory.generation == 2


async def test_a_key_that_was_not_answered_keeps_its_replicas(dht: FakeDht, directory: Directory) -> None:
    await Host(dht, FIRST).announcer.announce_now()
    await directory.refresh_now()
    dht.lost_keys.add(block_key(RUN, FIRST))
    await directory.refresh_now()
    assert directory.replicas(FIRST)
    assert directory.generation == 1


async def test_withdrawn_replicas_are_gone_at_the_next_look(dht: FakeDht, directory: Directory) -> None:
    host, other = Host(dht, FIRST), Host(dht, FIRST)
    await host.announcer.announce_now()
    await other.announcer.announce_now()
    await directory.refresh_now()
    await host.announcer.withdraw()
    await directory.refresh_now()
    assert [replica.peer_id for replica in directory.replicas(FIRST)] == [other.peer_id]
    assert [peer.peer_id for peer in directory.peers()] == [other.peer_id]


async def test_an_old_record_does_not_undo_a_withdrawal(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    before = dht.stored[block_key(RUN, FIRST)][host.peer_id]
    await directory.refresh_now()
    await host.announcer.withdraw()
    await directory.refresh_now()
    dht.put(before)
    await directory.refresh_now()
    assert not directory.replicas(FIRST)


async def test_a_block_that_a_host_drops_is_withdrawn_and_the_rest_stays(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST, BlockId(1, 1))
    await host.announcer.announce_now()
    await directory.refresh_now()
    host.blocks = (BlockId(1, 1),)
    dht.time_s += 1
    assert await host.announcer.announce_now()
    await directory.refresh_now()
    assert live_blocks(directory.snapshot()) == (BlockId(1, 1),)


async def test_a_new_version_shows_and_is_no_new_generation(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    await directory.refresh_now()
    host.steps = 50
    dht.time_s += PERIOD_S
    await host.announcer.announce_now()
    await directory.refresh_now()
    assert directory.replicas(FIRST)[0].version == 50
    assert directory.generation == 1


async def test_a_host_that_moves_is_a_new_generation(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    await directory.refresh_now()
    host.port = 4001
    dht.time_s += 1
    await host.announcer.announce_now()
    await directory.refresh_now()
    assert directory.replicas(FIRST)[0].endpoint == "127.0.0.1:4001"
    assert directory.generation == 2


async def test_a_replayed_older_version_is_ignored(dht: FakeDht, directory: Directory) -> None:
    identity = Identity.generate()
    old = entry_of(identity, FIRST, version=1, expiration_s=START_S + 60, endpoint="127.0.0.1:1")
    new = entry_of(identity, FIRST, version=2, expiration_s=START_S + 10, endpoint="127.0.0.1:2")
    for entry in (new, old):
        dht.put(entry)
        await directory.refresh_now()
        assert [replica.endpoint for replica in directory.replicas(FIRST)] == ["127.0.0.1:2"]
    dht.time_s += 11  # the newer one has expired, the older one is alive: the host is gone all the same
    await directory.refresh_now()
    assert not directory.replicas(FIRST)


async def test_versions_are_forgotten_when_no_older_record_can_be_alive(dht: FakeDht, directory: Directory) -> None:
    identity = Identity.generate()
    dht.put(entry_of(identity, FIRST, version=9, expiration_s=START_S + 10))
    await directory.refresh_now()
    dht.time_s += 10 + MAX_ANNOUNCE_TTL_S + 1
    await directory.refresh_now()
    dht.put(entry_of(identity, FIRST, version=1, expiration_s=dht.time_s + 10))
    await directory.refresh_now()
    assert directory.replicas(FIRST)


@pytest.mark.parametrize("damage", ["forged", "another owner's", "another key's", "wrong size of block"])
async def test_a_bad_record_hides_nobody(dht: FakeDht, directory: Directory, damage: str) -> None:
    host, mallory = Host(dht, FIRST), Identity.generate()
    await host.announcer.announce_now()
    bad = entry_of(mallory, FIRST, version=1, expiration_s=START_S + 20)
    if damage == "forged":
        bad = bad._replace(value=bad.value[:-1] + bytes([bad.value[-1] ^ 1]))
    elif damage == "another owner's":
        bad = bad._replace(subkey=Identity.generate().peer_id)
    elif damage == "another key's":
        bad = entry_of(mallory, BlockId(0, 1), version=1, expiration_s=START_S + 20)._replace(key=bad.key)
    else:
        bad = entry_of(mallory, FIRST, version=1, expiration_s=START_S + 20, n_experts=3)
    dht.put(bad)
    await directory.refresh_now()
    assert [replica.peer_id for replica in directory.replicas(FIRST)] == [host.peer_id]


async def test_a_peer_that_failed_is_avoided_for_a_while(dht: FakeDht, directory: Directory) -> None:
    host, other = Host(dht, FIRST), Host(dht, FIRST)
    await host.announcer.announce_now()
    await other.announcer.announce_now()
    await directory.refresh_now()
    directory.report_failure(host.peer_id, 5.0)
    assert [replica.peer_id for replica in directory.replicas(FIRST)] == [other.peer_id]
    assert directory.generation == 2
    assert len(directory.peers()) == 2
    await directory.refresh_now()
    assert len(directory.replicas(FIRST)) == 1
    dht.time_s += 5.0
    assert len(directory.replicas(FIRST)) == 2
    await directory.refresh_now()
    assert directory.generation == 3


async def test_a_peer_that_answers_again_is_shown_at_once(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    await directory.refresh_now()
    directory.report_failure(host.peer_id, 30.0)
    assert directory.snapshot().lost_blocks() == tuple(all_blocks(MODEL))
    directory.report_success(host.peer_id)
    assert directory.replicas(FIRST)
    assert directory.generation == 3


async def test_no_peer_is_avoided_for_ever(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    host.announcer = Announcer(dht, host.identity, Admission(RUN), describe=host.describe, ttl_s=MAX_ANNOUNCE_TTL_S)
    await host.announcer.announce_now()
    await directory.refresh_now()
    directory.report_failure(host.peer_id, 1e9)
    dht.time_s += MAX_AVOID_S
    assert directory.replicas(FIRST)


async def test_a_waiter_hears_of_the_first_replica(dht: FakeDht, directory: Directory) -> None:
    seen = directory.generation
    waiter = asyncio.create_task(directory.wait_for_change(5.0, since=seen))
    await asyncio.sleep(0)
    await Host(dht, FIRST).announcer.announce_now()
    await directory.refresh_now()
    assert await waiter
    assert await directory.wait_for_change(5.0, since=seen)  # a change that has been is not missed
    assert not await directory.wait_for_change(0.01)


async def test_a_report_from_a_compute_thread_wakes_the_loop(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    await directory.refresh_now()
    views: list[DirectoryView] = []
    directory.subscribe(views.append)
    waiter = asyncio.create_task(directory.wait_for_change(5.0))
    await asyncio.sleep(0)
    views.clear()
    thread = threading.Thread(target=directory.report_failure, args=(host.peer_id, 5.0))
    thread.start()
    assert await waiter
    thread.join()
    assert [live_blocks(view) for view in views] == [()]


async def test_a_subscriber_hears_of_each_generation_until_it_leaves(dht: FakeDht, directory: Directory) -> None:
    views: list[DirectoryView] = []
    leave = directory.subscribe(views.append)
    for block in (FIRST, BlockId(1, 0)):
        await Host(dht, block).announcer.announce_now()
        await directory.refresh_now()
        assert await directory.wait_for_change(1.0, since=directory.generation - 1)
        await asyncio.sleep(0)
    assert [len(live_blocks(view)) for view in views] == [1, 2]
    leave()
    await Host(dht, BlockId(1, 1)).announcer.announce_now()
    await directory.refresh_now()
    await asyncio.sleep(0)
    assert len(views) == 2


async def test_readers_in_threads_always_see_a_whole_view(dht: FakeDht, directory: Directory) -> None:
    hosts = [Host(dht, *all_blocks(MODEL)) for _ in range(3)]
    for host in hosts:
        await host.announcer.announce_now()
    await directory.refresh_now()
    torn: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            counts = {len(replicas) for replicas in directory.snapshot().replicas.values()}
            if len(counts) != 1:
                torn.append(len(counts))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(50):
        directory.report_failure(hosts[0].peer_id, 5.0)
        await directory.refresh_now()
        directory.report_success(hosts[0].peer_id)
    done.set()
    thread.join()
    assert not torn


async def test_the_background_refresh_survives_a_dht_that_is_down(
    dht: FakeDht, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Directory(dht, RUN, MODEL, refresh_s=0.01)
    dht.down = True
    await directory.start()
    await Host(FakeDht(), FIRST).announcer.announce_now()
    dht.down = False
    await Host(dht, FIRST).announcer.announce_now()
    assert await directory.wait_for_change(5.0, since=0)
    await directory.stop()
    await directory.stop()
    assert "not up to date" in caplog.text
