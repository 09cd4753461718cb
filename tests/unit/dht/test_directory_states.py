"""What the directory makes of replicas that do not serve, and of the trunk's: on a DHT in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dht.directory import Directory
from dht.record_versions import TTL_S
from protocol.identity import Identity
from protocol.manifest import TRUNK
from tests.support.announcing import FIRST, MODEL, RUN, Host, forged_trunk
from tests.support.fake_dht import START_S, FakeDht
from tests.support.views import live_blocks

if TYPE_CHECKING:
    from protocol.announcements import ReplicaState


@pytest.fixture
def dht() -> FakeDht:
    return FakeDht()


@pytest.fixture
def directory(dht: FakeDht) -> Directory:
    return Directory(dht, RUN, MODEL)


async def test_what_a_peer_says_of_its_averaging_is_found(dht: FakeDht, directory: Directory) -> None:
    await Host(dht, FIRST).announcer.announce_now()
    await directory.refresh_now()
    (replica,), (peer,) = directory.replicas(FIRST), directory.peers()
    assert (replica.state, replica.divergence) == ("serving", 0.25)
    assert (peer.own_tokens, peer.staleness, peer.exchanged_bytes) == (11, 1.5, 1 << 40)


async def test_a_trunk_is_a_replica_of_its_own_key_and_of_no_block(dht: FakeDht, directory: Directory) -> None:
    trainer, host = Host(dht, TRUNK), Host(dht, FIRST, port=4001)
    for peer in (trainer, host):
        await peer.announcer.announce_now()
    await directory.refresh_now()
    view = directory.snapshot()
    assert [replica.peer_id for replica in view.trunk] == [trainer.peer_id]
    assert directory.replicas(TRUNK) == view.trunk
    assert TRUNK not in view.replicas
    assert live_blocks(view) == (FIRST,)
    assert view.others == ()
    assert view.load_by_peer().keys() == {host.peer_id}
    dht.time_s += TTL_S
    assert directory.replicas(TRUNK) == ()
    assert directory.snapshot().trunk == ()


@pytest.mark.parametrize("state", ["joining", "stored"])
async def test_a_replica_that_does_not_serve_is_known_and_is_not_called(
    dht: FakeDht, directory: Directory, state: ReplicaState
) -> None:
    host, trainer = Host(dht, FIRST), Host(dht, TRUNK, port=4001)
    for peer in (host, trainer):
        peer.state = state
        await peer.announcer.announce_now()
    await directory.refresh_now()
    view = directory.snapshot()
    assert directory.replicas(FIRST) == directory.replicas(TRUNK) == ()
    assert FIRST in view.lost_blocks()
    assert [(replica.block, replica.peer_id, replica.state) for replica in view.others] == [
        (FIRST, host.peer_id, state)
    ]
    assert [(replica.peer_id, replica.state) for replica in view.trunk] == [(trainer.peer_id, state)]
    dht.time_s += TTL_S
    assert directory.snapshot().others == ()


async def test_one_record_leads_a_replica_through_its_states(dht: FakeDht, directory: Directory) -> None:
    host = Host(dht, FIRST)
    states: list[ReplicaState] = ["joining", "serving", "stored"]
    for generation, host.state in enumerate(states, 1):
        dht.time_s += 1
        assert await host.announcer.announce_now()
        await directory.refresh_now()
        view = directory.snapshot()
        found = (*view.replicas[FIRST], *view.others)
        assert [replica.state for replica in found] == [host.state]
        assert bool(directory.replicas(FIRST)) == (host.state == "serving")
        assert directory.generation == generation
    host.blocks = ()
    dht.time_s += 1
    assert await host.announcer.announce_now()
    await directory.refresh_now()
    assert directory.snapshot().others == ()


async def test_a_trunk_that_claims_experts_is_ignored(dht: FakeDht, directory: Directory) -> None:
    dht.put(forged_trunk(Identity.generate(), n_experts=4, expiration_s=START_S + 20))
    await directory.refresh_now()
    assert directory.snapshot().trunk == ()
    good = Identity.generate()
    dht.put(forged_trunk(good, n_experts=0, expiration_s=START_S + 20))
    await directory.refresh_now()
    assert [replica.peer_id for replica in directory.snapshot().trunk] == [good.peer_id]


async def test_whoever_is_avoided_is_avoided_in_every_state(dht: FakeDht, directory: Directory) -> None:
    joiner, trainer = Host(dht, FIRST), Host(dht, TRUNK, port=4001)
    joiner.state = "joining"
    for peer in (joiner, trainer):
        await peer.announcer.announce_now()
    await directory.refresh_now()
    for peer in (joiner, trainer):
        directory.report_failure(peer.peer_id, 5.0)
    hidden, all_of_it = directory.snapshot(), directory.snapshot(with_avoided=True)
    assert (hidden.others, hidden.trunk, directory.replicas(TRUNK)) == ((), (), ())
    assert (len(all_of_it.others), len(all_of_it.trunk), len(hidden.peers)) == (1, 1, 2)
