"""What hivemind gets to see of a peer's messages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DHTLocalStorage
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from dht.answers import clean_request, clean_response, is_known, node_id_of
from dht.packing import RecordChecker, wrap
from dht.validator import RecordValidator
from protocol.identity import Identity
from tests.support.dht_nodes import KEY, entry_by

if TYPE_CHECKING:
    from collections.abc import Callable


def test_what_a_peer_says_about_its_place_is_checked() -> None:
    me, liar = (PeerID.from_base58(Identity.generate().peer_id) for _ in range(2))
    checker = RecordChecker(time.time)
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=DHTID.generate().to_bytes()))
    clean_request(request, liar, checker)
    assert not request.HasField("peer")
    response = dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=DHTID.generate().to_bytes()))
    with pytest.raises(P2PDaemonError, match="claims another node's place"):
        clean_response(request, response, liar, knows(me), checker)


def knows(*peers: PeerID) -> Callable[[int], bool]:
    return {int(node_id_of(peer)) for peer in peers}.__contains__


def test_neighbors_in_a_wrong_place_and_known_ones_are_left_out_of_an_answer() -> None:
    me, known, sender, honest = (PeerID.from_base58(Identity.generate().peer_id) for _ in range(4))
    peers = (honest, honest, me, known)
    places = [node_id_of(honest), DHTID.generate(), node_id_of(me), node_id_of(known)]
    result = dht_pb2.FindResult(
        nearest_node_ids=[place.to_bytes() for place in places], nearest_peer_ids=[peer.to_bytes() for peer in peers]
    )
    response = dht_pb2.FindResponse(results=[result])
    request = dht_pb2.FindRequest(keys=[DHTID.generate(KEY).to_bytes()])
    clean_response(request, response, sender, knows(me, known), RecordChecker(time.time))
    assert list(response.results[0].nearest_peer_ids) == [honest.to_bytes()]


@pytest.mark.parametrize(
    "packed", [b"", b"\xc1", b"\x81\xa1a\x01", MSGPackSerializer.dumps([1, 2, 3]), b"\xc7\x01\x50\xc1", b"\x91" * 2000],
    ids=["empty", "invalid", "a map", "a list", "a broken dictionary", "deep"],
)  # fmt: skip
def test_an_answer_that_cannot_be_unpacked_is_no_answer(packed: bytes) -> None:
    sender = PeerID.from_base58(Identity.generate().peer_id)
    result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=packed, expiration_time=float("inf"))
    response = dht_pb2.FindResponse(results=[result])
    request = dht_pb2.FindRequest(keys=[DHTID.generate(KEY).to_bytes()])
    clean_response(request, response, sender, knows(), RecordChecker(time.time))
    assert response.results[0].type == dht_pb2.NOT_FOUND
    assert response.results[0].value == b""
    assert response.results[0].expiration_time == 0.0


def test_nothing_is_stored_in_a_cache_that_would_hide_the_store() -> None:
    request = dht_pb2.StoreRequest(keys=[b"x" * 20], in_cache=[True])
    clean_request(request, PeerID.from_base58(Identity.generate().peer_id), RecordChecker(time.time))
    assert list(request.in_cache) == [False]


def test_a_full_key_refuses_newcomers_and_renews_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.packing.MAX_SUBKEYS", 2)
    storage, validator = DHTLocalStorage(), RecordValidator(RecordChecker(time.time))
    validator.attach(storage)
    key_id, owners = DHTID.generate(KEY), [Identity.generate() for _ in range(3)]

    def offer(owner: Identity, version: int) -> bool:
        entry = entry_by(owner, version=version)
        record = DHTRecord(
            key_id.to_bytes(), MSGPackSerializer.dumps(entry.subkey), wrap(entry.value), entry.expiration_s
        )
        return bool(
            validator.validate(record)
            and storage.store_subkey(key_id, entry.subkey, record.value, record.expiration_time)
        )

    assert [offer(owner, 1) for owner in owners] == [True, True, False]
    assert offer(owners[0], 2)


def test_a_node_knows_itself_and_its_table_but_not_those_that_only_wait_for_a_place_in_it() -> None:
    me = DHTID(DHTID.MIN)
    table = RoutingTable(me, bucket_size=1, depth_modulo=1)
    high = [DHTID(DHTID.MAX - n) for n in (1, 2, 3)]
    for n, place in enumerate(high[:2]):
        table.add_or_update_node(place, PeerID(bytes([n])))
    assert high[1] in table.uid_to_peer_id, "a full bucket keeps it for later"
    assert [is_known(table, place) for place in (me, *high)] == [True, True, False, False]
