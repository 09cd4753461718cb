"""What a lighthouse answers, as hivemind asks and reads it."""

from __future__ import annotations

import time

import pytest
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from common.errors import InvalidInputError, LimitExceededError
from coordinator.lighthouse import hivemind_pb2 as ours
from coordinator.lighthouse.answers import N_NEIGHBORS, Answers
from coordinator.lighthouse.store import StoredRecords
from dht.packing import DICTIONARY_TAG, pack, pack_dictionary, place_of_key, place_of_peer, wrap
from protocol.admission import Admission
from protocol.identity import Identity
from tests.support.dht_nodes import KEY, RUN, entry_by

PLACE = place_of_key(KEY)


def answers() -> Answers:
    return Answers(b"me", StoredRecords(Admission(RUN), time.time))


def store_request(owner: Identity) -> ours.StoreRequest:
    entry = entry_by(owner)
    theirs = dht_pb2.StoreRequest(
        keys=[PLACE, PLACE],
        subkeys=[pack(entry.subkey), pack(entry.subkey)],
        values=[wrap(entry.value), b"\xc4\x01x"],
        expiration_time=[entry.expiration_s] * 2,
        in_cache=[False] * 2,
    )
    return ours.StoreRequest.FromString(theirs.SerializeToString())


def found(lighthouse: Answers, *keys: bytes) -> list[dht_pb2.FindResult]:
    raw = lighthouse.find(ours.FindRequest(keys=keys), ()).SerializeToString()
    return list(dht_pb2.FindResponse.FromString(raw).results)


def test_what_hivemind_stores_it_finds_again_by_sub_key() -> None:
    lighthouse, owner = answers(), Identity.generate()
    assert list(lighthouse.store(store_request(owner)).store_ok) == [True, False]
    result, nothing = found(lighthouse, PLACE, place_of_key("other"))
    dictionary = MSGPackSerializer.loads(result.value)
    assert result.type == dht_pb2.FOUND_DICTIONARY
    assert isinstance(dictionary, DictionaryDHTValue)
    assert [name for name, _ in dictionary.items()] == [owner.peer_id]
    assert nothing.type == dht_pb2.NOT_FOUND


def test_a_dictionary_is_taken_apart_and_each_record_checked() -> None:
    entries = [entry_by(Identity.generate()) for _ in range(2)]
    good = [(entry.subkey, wrap(entry.value), entry.expiration_s) for entry in entries]
    bad = (Identity.generate().peer_id, good[0][1], good[0][2])
    for items, taken in ((good, True), ([bad], False)):
        request = ours.StoreRequest(
            keys=[PLACE], subkeys=[DICTIONARY_TAG], values=[pack_dictionary(items)], expiration_time=[good[0][2]]
        )
        lighthouse = answers()
        assert list(lighthouse.store(request).store_ok) == [taken]
        assert (found(lighthouse, PLACE)[0].type == dht_pb2.FOUND_DICTIONARY) is taken


def test_neighbors_are_the_nearest_without_the_one_who_asks() -> None:
    peers = [b"peer %d" % number for number in range(50)]
    request = ours.FindRequest(keys=[PLACE], peer=ours.NodeInfo(node_id=place_of_peer(peers[0])))
    (result,) = answers().find(request, peers).results
    by_distance = sorted(peers[1:], key=lambda peer: int.from_bytes(place_of_peer(peer)) ^ int.from_bytes(PLACE))
    assert list(result.nearest_peer_ids) == by_distance[:N_NEIGHBORS]
    assert list(result.nearest_node_ids) == [place_of_peer(peer) for peer in by_distance[:N_NEIGHBORS]]


def test_too_many_keys_and_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(LimitExceededError, match="keys: is 257, but the limit is 256"):
        answers().find(ours.FindRequest(keys=[PLACE] * 257), ())
    with pytest.raises(LimitExceededError, match="keys: is 4097, but the limit is 4096"):
        answers().store(ours.StoreRequest(keys=[PLACE] * 4097))
    with pytest.raises(InvalidInputError, match="keys: are not as many as"):
        answers().store(ours.StoreRequest(keys=[PLACE], values=[b"x"]))


def test_records_over_the_size_of_an_answer_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lighthouse = answers()
    lighthouse.store(store_request(Identity.generate()))
    size = len(found(lighthouse, PLACE)[0].value)
    monkeypatch.setattr("coordinator.lighthouse.answers.MAX_VALUE_BYTES", size)
    assert [bool(result.value) for result in found(lighthouse, PLACE, PLACE)] == [True, False]
