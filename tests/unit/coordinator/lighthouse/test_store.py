"""What a lighthouse keeps, and that hivemind reads it as it is packed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils import MSGPackSerializer

from common.errors import RecordError
from coordinator.lighthouse.announcer import LighthouseAnnouncer
from coordinator.lighthouse.store import StoredRecords
from dht.packing import Record, pack, pack_dictionary, place_of_key, place_of_peer, unpack_dictionary, wrap
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord, encode_block
from protocol.identity import Identity
from protocol.manifest import BlockId
from protocol.records import block_key, sign_record
from tests.support.dht_nodes import KEY, MODEL, RUN, entry_by

if TYPE_CHECKING:
    from dht.record_store import Entry

PLACE = place_of_key(KEY)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


def carried(entry: Entry) -> Record:
    return Record(place_of_key(entry.key), pack(entry.subkey), wrap(entry.value), entry.expiration_s)


def test_places_and_dictionaries_are_hiveminds() -> None:
    entries = [entry_by(Identity.generate()) for _ in range(3)]
    packed = pack_dictionary((entry.subkey, wrap(entry.value), entry.expiration_s) for entry in entries)
    theirs = MSGPackSerializer.loads(packed)
    assert isinstance(theirs, DictionaryDHTValue)
    assert {owner: item.value for owner, item in theirs.items()} == {e.subkey: wrap(e.value) for e in entries}
    assert theirs.latest_expiration_time == max(entry.expiration_s for entry in entries)
    again = MSGPackSerializer.dumps(theirs)
    assert [record for record, _ in unpack_dictionary(PLACE, again)] == [carried(entry) for entry in entries]
    assert DHTID.generate(source=KEY).to_bytes() == PLACE
    assert DHTID.generate(source=b"peer").to_bytes() == place_of_peer(b"peer")


def test_a_good_record_is_kept_until_it_expires() -> None:
    clock, entry = Clock(), entry_by(Identity.generate())
    store = StoredRecords(Admission(RUN), clock)
    assert store.put(carried(entry))
    assert store.get(PLACE)[entry.subkey].value == wrap(entry.value)
    assert (store.n_records, store.n_bytes) == (1, len(wrap(entry.value)))
    clock.now_s = entry.expiration_s + 0.001
    assert store.get(PLACE) == {}
    store.expire()
    assert (store.n_records, store.n_bytes) == (0, 0)


def test_a_record_that_expires_no_later_changes_nothing() -> None:
    store, owner = StoredRecords(Admission(RUN), Clock()), Identity.generate()
    newer, older = entry_by(owner, version=2, ttl_s=60.0), entry_by(owner, ttl_s=30.0)
    assert store.put(carried(newer))
    assert not store.put(carried(older))
    assert store.get(PLACE)[owner.peer_id].value == wrap(newer.value)


def test_a_renewed_record_takes_the_place_of_the_old_one() -> None:
    store, owner = StoredRecords(Admission(RUN), Clock()), Identity.generate()
    renewed = entry_by(owner, version=2, ttl_s=60.0)
    assert store.put(carried(entry_by(owner)))
    assert store.put(carried(renewed))
    assert (store.n_records, store.n_bytes) == (1, len(wrap(renewed.value)))


def test_a_forged_record_is_refused() -> None:
    store, record = StoredRecords(Admission(RUN), Clock()), carried(entry_by(Identity.generate()))
    flipped = bytes([record.value[-1] ^ 1])
    with pytest.raises(RecordError):
        store.put(record._replace(value=record.value[:-1] + flipped))
    with pytest.raises(RecordError, match="subkey: not the owner's"):
        store.put(record._replace(subkey=pack(Identity.generate().peer_id)))
    with pytest.raises(RecordError, match="expiration: not the one that was signed"):
        store.put(record._replace(expiration_time=record.expiration_time + 1))
    assert store.n_records == 0


def test_records_of_another_run_and_of_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(RecordError, match="key: this node serves run another only"):
        StoredRecords(Admission("another"), Clock()).put(carried(entry_by(Identity.generate())))
    store = StoredRecords(Admission(RUN), Clock())
    store.serve_only(MODEL)
    assert store.put(replica_of(BlockId(0, 1)))
    with pytest.raises(RecordError, match="key: the run has no block 0/2"):
        store.put(replica_of(BlockId(0, 2)))


def test_a_closed_run_stores_only_what_its_peers_say() -> None:
    admission, owner = Admission(RUN, bytes(range(32))), Identity.generate()
    store = StoredRecords(admission, Clock())
    with pytest.raises(RecordError, match="ticket: this run admits only those with its invite"):
        store.put(carried(entry_by(owner)))
    assert store.put(carried(entry_by(owner, ticket=admission.ticket(owner.peer_id))))


class Kept:
    """A member that keeps what it is to store."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def store(self, record: Record, _: object) -> None:
        self.records.append(record)


def test_a_lighthouse_shows_its_ticket_so_that_a_closed_run_stores_what_it_says() -> None:
    admission, member = Admission(RUN, bytes(range(32))), Kept()
    said = PeerRecord(role="lighthouse")
    announcer = LighthouseAnnouncer(member, Identity.generate(), admission, said, Clock())  # type: ignore[arg-type]
    trio.run(announcer.withdraw)
    assert StoredRecords(admission, Clock()).put(member.records[0])


def replica_of(block: BlockId) -> Record:
    owner, key, expiration_s = Identity.generate(), block_key(RUN, block), time.time() + 30.0
    payload = encode_block(BlockRecord(block=block, version=1, endpoint="127.0.0.1:4000", n_experts=4))
    raw = sign_record(owner, key=key, version=1, expiration_s=expiration_s, payload=payload)
    return Record(place_of_key(key), pack(owner.peer_id), wrap(raw), expiration_s)


def test_a_full_store_refuses_newcomers_and_renews_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.packing.MAX_SUBKEYS", 1)
    store, owner = StoredRecords(Admission(RUN), Clock()), Identity.generate()
    assert store.put(carried(entry_by(owner)))
    with pytest.raises(RecordError, match=r"store: full \(1 owners under one key\)"):
        store.put(carried(entry_by(Identity.generate())))
    assert store.put(carried(entry_by(owner, version=2, ttl_s=60.0)))


def test_a_store_has_a_limit_of_bytes() -> None:
    first = carried(entry_by(Identity.generate()))
    store = StoredRecords(Admission(RUN), Clock(), max_bytes=len(first.value) + 10)
    assert store.put(first)
    with pytest.raises(RecordError, match=r"store: full \(\d+ bytes\)"):
        store.put(carried(entry_by(Identity.generate())))
