"""Announcing and joining, on a DHT in memory whose clock the test moves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from common.errors import ManifestError, RecordError, UnavailableError
from dht.announcer import Announcement, Announcer
from dht.directory import Directory
from dht.join import RETRY_S, fetch_manifest, publish_manifest
from protocol.admission import Admission
from protocol.announcements import BlockRecord
from protocol.identity import Identity
from protocol.manifest import TRUNK
from protocol.records import block_key, manifest_key, peers_key
from tests.support.announcing import FIRST, MANIFEST, MODEL, OWNER, RUN, Host
from tests.support.fake_dht import FakeDht


@pytest.fixture
def dht() -> FakeDht:
    return FakeDht()


@pytest.fixture
def directory(dht: FakeDht) -> Directory:
    return Directory(dht, RUN, MODEL)


async def test_the_announcer_repeats_itself_and_tries_again_after_a_failure(
    dht: FakeDht, caplog: pytest.LogCaptureFixture
) -> None:
    host, described, enough = Host(dht, FIRST), [], asyncio.Event()

    def describe() -> Announcement:
        described.append(dht.down)
        if len(described) == 3:
            enough.set()
        return host.describe()

    announcer = Announcer(dht, host.identity, Admission(RUN), describe=describe, period_s=0.01)
    dht.down = True
    await announcer.start()
    assert "could not announce" in caplog.text
    dht.down = False
    await asyncio.wait_for(enough.wait(), 5.0)
    await announcer.stop()
    assert dht.stored.keys() == {peers_key(RUN), block_key(RUN, FIRST)}
    await announcer.stop()


async def test_records_follow_each_other_although_the_clock_stands_still_or_goes_back(
    dht: FakeDht, directory: Directory
) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    host.steps = 1
    assert await host.announcer.announce_now()
    dht.time_s -= 2
    host.steps = 2
    assert await host.announcer.announce_now()
    await directory.refresh_now()
    assert directory.replicas(FIRST)[0].version == 2


async def test_a_restarted_host_is_heard_although_it_counts_anew(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    for _ in range(3):
        await host.announcer.announce_now()
    await directory.refresh_now()
    dht.time_s += 1
    host.port, host.steps = 4009, 1
    again = Announcer(dht, host.identity, Admission(RUN), describe=host.describe)
    assert await again.announce_now()
    await directory.refresh_now()
    assert directory.replicas(FIRST)[0].endpoint == "127.0.0.1:4009"


async def test_a_block_that_is_dropped_is_withdrawn_again_until_someone_has_heard(
    dht: FakeDht, directory: Directory
) -> None:
    host = Host(dht, FIRST, TRUNK)
    await host.announcer.announce_now()
    host.blocks = (FIRST,)
    dht.down = True
    with pytest.raises(UnavailableError):
        await host.announcer.announce_now()
    dht.down = False
    await host.announcer.announce_now()
    await directory.refresh_now()
    assert directory.snapshot().trunk == ()
    assert directory.replicas(FIRST)
    renewed = dht.stored[block_key(RUN, TRUNK)][host.peer_id]
    await host.announcer.announce_now()
    assert dht.stored[block_key(RUN, TRUNK)][host.peer_id] == renewed  # once it was heard, no more is said


async def test_a_block_that_comes_back_is_announced_over_its_withdrawal(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    for host.blocks in ((FIRST,), (), (FIRST,)):
        assert await host.announcer.announce_now()
        await directory.refresh_now()
        assert bool(directory.replicas(FIRST)) == bool(host.blocks)


async def test_a_withdrawal_that_nobody_hears_is_told_and_ends(dht: FakeDht, caplog: pytest.LogCaptureFixture) -> None:
    host = Host(dht, FIRST)
    await host.announcer.announce_now()
    dht.down = True
    await host.announcer.withdraw()
    assert "could not be withdrawn" in caplog.text


async def test_a_published_manifest_is_found_by_its_run_id_and_kept_by_who_found_it(dht: FakeDht) -> None:
    await publish_manifest(dht, OWNER, MANIFEST)
    assert await fetch_manifest(dht, RUN, 1.0) == MANIFEST
    assert {(entry.key, entry.subkey) for entry in dht.kept} == {(manifest_key(RUN), OWNER.peer_id)}
    assert len(dht.kept) == 2  # once by the owner, once by who found it


async def test_only_the_owner_publishes(dht: FakeDht) -> None:
    with pytest.raises(ManifestError, match="owner"):
        await publish_manifest(dht, Identity.generate(), MANIFEST)
    assert not dht.stored


async def test_a_manifest_that_comes_late_is_waited_for(dht: FakeDht) -> None:
    fetching = asyncio.create_task(fetch_manifest(dht, RUN, 10.0))
    await dht.looked_up.wait()
    await publish_manifest(dht, OWNER, MANIFEST)
    assert await fetching == MANIFEST


@pytest.mark.parametrize("down", [False, True])
async def test_a_run_that_nobody_knows_is_one_clear_sentence(dht: FakeDht, *, down: bool) -> None:
    dht.down = down
    with pytest.raises(UnavailableError, match="check the run id") as caught:
        await fetch_manifest(dht, RUN, RETRY_S / 2)
    assert RUN in str(caught.value)


async def test_another_runs_manifest_is_not_taken(dht: FakeDht) -> None:
    other = replace(MANIFEST, seed=1)
    await publish_manifest(dht, OWNER, other)
    found = dht.stored[manifest_key(other.run_id)][OWNER.peer_id]
    dht.put(found._replace(key=manifest_key(RUN)))
    with pytest.raises(UnavailableError, match="signed for"):
        await fetch_manifest(dht, RUN, RETRY_S / 2)


def test_a_description_with_a_wrong_field_is_our_bug_and_is_told() -> None:
    with pytest.raises(RecordError, match="endpoint"):
        BlockRecord(block=FIRST, version=0, endpoint="nowhere", n_experts=4)
