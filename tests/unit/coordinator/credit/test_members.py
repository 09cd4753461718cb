"""Who is in a run, by signed records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from coordinator.credit.members import RunMembers
from dht.announcer import Announcement, Announcer
from dht.record_store import Entry
from protocol.admission import Admission
from protocol.announcements import PeerRecord
from protocol.endpoints import Address
from protocol.records import peers_key
from tests.support.crediting import HOST, RUN, STRANGER, TRAINER
from tests.support.fake_dht import FakeDht

if TYPE_CHECKING:
    from protocol.identity import Identity

ENDPOINT = "192.0.2.1:4000"


async def announce(dht: FakeDht, identity: Identity, record: PeerRecord, token: bytes = b"") -> None:
    announcer = Announcer(dht, identity, Admission(RUN, token), describe=lambda: Announcement(peer=record))
    await announcer.announce_now()


async def test_hosts_and_trainers_are_seen_with_what_they_announce() -> None:
    dht = FakeDht()
    await announce(dht, HOST, PeerRecord(role="host", endpoint=ENDPOINT))
    await announce(dht, TRAINER, PeerRecord(role="trainer", own_tokens=77))
    await announce(dht, STRANGER, PeerRecord(role="coordinator", relay="/ip4/192.0.2.1/udp/4001/quic-v1"))
    members = RunMembers(dht, Admission(RUN))
    seen = {one.address.peer_id: one for one in await members.look()}
    assert seen.keys() == {HOST.peer_id, TRAINER.peer_id}
    assert (seen[HOST.peer_id].role, seen[HOST.peer_id].address) == ("host", Address(HOST.peer_id, ENDPOINT))
    assert (seen[TRAINER.peer_id].role, seen[TRAINER.peer_id].own_tokens) == ("trainer", 77)
    assert members.relay_addresses() == {STRANGER.peer_id: "/ip4/192.0.2.1/udp/4001/quic-v1"}


async def test_who_has_left_is_seen_no_longer() -> None:
    dht = FakeDht()
    await announce(dht, HOST, PeerRecord(role="host", endpoint=ENDPOINT))
    members = RunMembers(dht, Admission(RUN))
    assert len(await members.look()) == 1
    dht.time_s += 60
    assert await members.look() == ()


async def test_a_record_that_its_owner_has_not_signed_or_that_shows_no_ticket_makes_nobody_a_member() -> None:
    dht, token = FakeDht(), bytes(range(32))
    await announce(dht, HOST, PeerRecord(role="host", endpoint=ENDPOINT))
    await announce(dht, TRAINER, PeerRecord(role="trainer"), token)
    key = peers_key(RUN)
    dht.put(Entry(key, STRANGER.peer_id, dht.stored[key][HOST.peer_id].value, dht.time_s + 20))
    assert [one.address.peer_id for one in await RunMembers(dht, Admission(RUN, token)).look()] == [TRAINER.peer_id]
    assert len(await RunMembers(dht, Admission(RUN)).look()) == 2


async def test_a_dht_that_does_not_answer_is_told() -> None:
    with pytest.raises(UnavailableError):
        await RunMembers(FakeDht(down=True), Admission(RUN)).look()
