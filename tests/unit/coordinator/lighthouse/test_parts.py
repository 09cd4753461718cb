"""A lighthouse's routing table, its search, its relay's accounts and its bounds, without a socket."""

from __future__ import annotations

import pytest

from common.errors import OverloadedError, UnavailableError
from coordinator.lighthouse.connection_limits import ConnectionLimit
from coordinator.lighthouse.hivemind_pb2 import FOUND_DICTIONARY, FindResponse, FindResult
from coordinator.lighthouse.search import MAX_CALLS, N_NEAREST, KeySearch
from coordinator.lighthouse.table import BUCKET_SIZE, RoutingTable
from dht.packing import pack_dictionary, place_of_key, place_of_peer, wrap
from dht.relay.quotas import (
    MAX_CIRCUITS_PER_PEER,
    MAX_RESERVATIONS_PER_ADDRESS,
    RESERVATION_S,
    RelayLimits,
    RelayQuotas,
)

ME = b"me"
PEERS = [b"peer %d" % number for number in range(400)]
KEY = place_of_key("run/peers")


class Clock:
    """A clock that stands still until it is set."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def distance_to(place: bytes, peer: bytes) -> int:
    return int.from_bytes(place_of_peer(peer)) ^ int.from_bytes(place)


def test_a_full_bucket_keeps_who_has_been_there() -> None:
    table = RoutingTable(ME)
    taken = [peer for peer in PEERS if table.heard_from(peer, 1.0)]
    assert len(taken) == len(table) < len(PEERS)
    far = [peer for peer in PEERS if distance_to(place_of_peer(ME), peer).bit_length() == 160]
    assert [peer for peer in taken if peer in far] == far[:BUCKET_SIZE]
    assert not table.heard_from(far[-1], 2.0)
    for _ in range(2):
        table.silent(far[0])
    assert table.heard_from(far[-1], 3.0)


def test_a_member_is_forgotten_after_two_calls_without_an_answer_in_a_row() -> None:
    table = RoutingTable(ME)
    table.heard_from(PEERS[0], 1.0)
    table.silent(PEERS[0])
    table.heard_from(PEERS[0], 2.0)
    table.silent(PEERS[0])
    assert PEERS[0] in table
    table.silent(PEERS[0])
    assert PEERS[0] not in table
    table.silent(PEERS[0])
    assert not table.heard_from(ME, 1.0)


def test_quiet_members_are_named_longest_silence_first() -> None:
    table = RoutingTable(ME)
    for when_s, peer in ((3.0, PEERS[0]), (1.0, PEERS[1]), (2.0, PEERS[2])):
        table.heard_from(peer, when_s)
    assert table.quiet_since(3.0) == [PEERS[1], PEERS[2]]


def answer_naming(*peers: bytes) -> FindResponse:
    return FindResponse(results=[FindResult(nearest_peer_ids=peers)])


def test_a_search_finds_the_nearest_of_all_by_asking_each_peer_what_it_knows() -> None:
    """Each peer knows the four that are nearest to the key among those farther from it, and two nearer ones."""
    by_distance = sorted(PEERS, key=lambda peer: distance_to(KEY, peer))
    search = KeySearch({KEY: "key"}, [by_distance[-1]], ME)
    while calls := search.next_calls():
        for peer, places in calls.items():
            rank = by_distance.index(peer)
            search.answered(peer, places, answer_naming(*by_distance[rank // 2 : rank // 2 + 2], ME))
    assert set(by_distance[:N_NEAREST]) <= search.peers
    assert by_distance[0] in search.answered_by
    assert ME not in search.peers
    assert len(search.answered_by) < 40


def test_who_does_not_answer_is_not_asked_again_and_another_is_asked_instead() -> None:
    by_distance = sorted(PEERS[:20], key=lambda peer: distance_to(KEY, peer))
    search = KeySearch({KEY: "key"}, by_distance, ME)
    first = search.next_calls()
    assert list(first) == by_distance[:N_NEAREST]
    for peer in first:
        search.failed(peer)
    assert list(search.next_calls()) == by_distance[N_NEAREST : 2 * N_NEAREST]


def test_a_peer_is_asked_for_all_its_keys_at_once_and_a_search_ends() -> None:
    keys = {place_of_key(str(number)): str(number) for number in range(100)}
    search = KeySearch(keys, [PEERS[0]], ME)
    (places,) = search.next_calls().values()
    assert len(places) == 64
    n_calls, endless = 1, iter(range(10_000))
    while calls := search.next_calls():
        n_calls += len(calls)
        for peer, asked in calls.items():
            named = [b"invented %d" % next(endless) for _ in range(8)]
            search.answered(peer, asked, FindResponse(results=[FindResult(nearest_peer_ids=named) for _ in asked]))
    assert n_calls == MAX_CALLS


def test_records_go_to_the_reader_by_key_and_owner() -> None:
    taken: list[tuple[str, dict[str, bytes]]] = []
    search = KeySearch({KEY: "key"}, [PEERS[0]], ME, lambda name, found: taken.append((name, found)))
    packed = pack_dictionary([("owner", wrap(b"raw"), 9.0), ("other", b"no bytes of msgpack's", 9.0)])
    (places,) = search.next_calls().values()
    search.answered(PEERS[0], places, FindResponse(results=[FindResult(type=FOUND_DICTIONARY, value=packed)]))
    assert taken == [("key", {"owner": b"raw"})]


LIMITS = RelayLimits(max_reservations=2, max_circuits=2, circuit_bytes=100, circuit_s=60.0)


def test_a_reservation_is_for_an_hour_and_is_renewed_though_all_are_taken() -> None:
    clock = Clock()
    quotas = RelayQuotas[bytes](LIMITS, clock)
    assert quotas.reserve(PEERS[0], "127.0.0.1") == 1000.0 + RESERVATION_S
    quotas.reserve(PEERS[1], "127.0.0.1")
    with pytest.raises(OverloadedError, match="this relay has 2 reservations, the most it takes"):
        quotas.reserve(PEERS[2], "127.0.0.1")
    clock.now_s += 10.0
    quotas.reserve(PEERS[0], "127.0.0.1")
    clock.now_s += RESERVATION_S - 5.0
    assert (quotas.has_reserved(PEERS[0]), quotas.has_reserved(PEERS[1])) == (True, False)
    quotas.reserve(PEERS[2], "127.0.0.1")
    quotas.keep_only([PEERS[2]])
    assert (quotas.n_reservations, quotas.refused) == (1, 1)


@pytest.mark.parametrize(("address", "all_in"), [("8.8.8.8", False), ("192.168.1.2", True), ("", True)])
def test_one_public_address_does_not_get_all_reservations(address: str, *, all_in: bool) -> None:
    quotas = RelayQuotas[bytes](
        RelayLimits(max_reservations=100, max_circuits=1, circuit_bytes=1, circuit_s=1.0), Clock()
    )
    for peer in PEERS[:MAX_RESERVATIONS_PER_ADDRESS]:
        quotas.reserve(peer, address)
    if all_in:
        quotas.reserve(PEERS[-1], address)
    else:
        with pytest.raises(OverloadedError, match="from one address"):
            quotas.reserve(PEERS[-1], address)
        quotas.reserve(PEERS[-1], "1.1.1.1")


def test_circuits_lead_to_who_has_reserved_and_are_bounded() -> None:
    quotas = RelayQuotas[bytes](LIMITS, Clock())
    with pytest.raises(UnavailableError, match="no reservation"):
        quotas.open(PEERS[0], PEERS[1])
    quotas.reserve(PEERS[1], "127.0.0.1")
    first, _ = quotas.open(PEERS[0], PEERS[1]), quotas.open(PEERS[0], PEERS[1])
    with pytest.raises(OverloadedError, match="this relay carries 2 circuits, 2 of yours"):
        quotas.open(PEERS[0], PEERS[1])
    quotas.close(first)
    quotas.close(first)
    assert quotas.n_circuits == 1


def test_one_peer_does_not_get_all_circuits() -> None:
    limits = RelayLimits(max_reservations=9, max_circuits=99, max_circuits_per_target=MAX_CIRCUITS_PER_PEER)
    quotas = RelayQuotas[bytes](limits, Clock())
    for peer in PEERS[:3]:
        quotas.reserve(peer, "127.0.0.1")
    for number in range(MAX_CIRCUITS_PER_PEER):
        quotas.open(PEERS[9], PEERS[number % 2])
    with pytest.raises(OverloadedError, match=f"{MAX_CIRCUITS_PER_PEER} of yours"):
        quotas.open(PEERS[9], PEERS[2])
    for number in range(MAX_CIRCUITS_PER_PEER):
        quotas.open(PEERS[10 + number], PEERS[2])
    with pytest.raises(OverloadedError, match="circuits to that peer"):
        quotas.open(PEERS[8], PEERS[2])


def test_nodes_and_peers_of_libp2p_share_the_limits_and_are_reached_each_their_way() -> None:
    quotas = RelayQuotas[bytes](LIMITS, Clock())
    quotas.reserve(PEERS[1], "127.0.0.1")
    quotas.reserve(PEERS[2], "127.0.0.1", "kilohive")
    with pytest.raises(OverloadedError, match="the most it takes"):
        quotas.reserve(PEERS[3], "127.0.0.1", "kilohive")
    with pytest.raises(UnavailableError, match="no reservation"):
        quotas.open(PEERS[0], PEERS[2])
    quotas.open(PEERS[0], PEERS[1])
    quotas.open(PEERS[0], PEERS[2], "kilohive")
    with pytest.raises(OverloadedError, match="2 circuits"):
        quotas.open(PEERS[4], PEERS[2], "kilohive")
    quotas.release(PEERS[1], "kilohive")
    assert quotas.has_reserved(PEERS[1])
    quotas.release(PEERS[2], "kilohive")
    quotas.reserve(PEERS[3], "127.0.0.1", "kilohive")


def test_a_circuit_carries_its_bytes_and_not_one_more() -> None:
    quotas = RelayQuotas[bytes](LIMITS, Clock())
    quotas.reserve(PEERS[1], "127.0.0.1")
    circuit = quotas.open(PEERS[0], PEERS[1])
    assert [quotas.pass_bytes(circuit, n) for n in (60, 41, 40, 1)] == [True, False, True, False]
    assert quotas.relayed_bytes == 100


def test_places_are_bounded_in_all_and_for_each_and_come_back() -> None:
    bound = ConnectionLimit(3, 2)
    with bound.place("a") as one, bound.place("a") as two, bound.place("a") as three:
        assert (one, two, three, bound.n_held) == (True, True, False, 2)
        with bound.place("b") as other, bound.place("c") as too_many:
            assert (other, too_many) == (True, False)
    assert (bound.n_held, bound.refused) == (0, 2)
