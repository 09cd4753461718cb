"""One lookup of many keys: whom it asks, how often, and what it makes of different answers."""

from __future__ import annotations

import time
from collections import defaultdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

from dht.lookup import MAX_KEYS_PER_CALL, Lookup
from dht.packing import wrap

if TYPE_CHECKING:
    from collections.abc import Collection

N_ASKED = 8
KEYS = [f"run/{i}" for i in range(34)]


class FakeNode:
    """Knows `near` peers. Each answers with what it `holds` and the peers that it `tells` of, unless it is `silent`."""

    num_workers = 4

    def __init__(self, *near: str) -> None:
        self.node_id = DHTID.generate(source="me")
        table = SimpleNamespace(get_nearest_neighbors=lambda *_, **__: [(place(peer), peer) for peer in near])
        self.protocol = SimpleNamespace(storage={}, bucket_size=20, routing_table=table)
        self.holds: defaultdict[str, dict[str, DictionaryDHTValue]] = defaultdict(dict)
        self.tells: dict[str, tuple[str, ...]] = {}
        self.silent: set[str] = set()
        self.calls: list[tuple[str, int]] = []

    def put(self, peer: str, key: str, owner: str, raw: bytes, ttl_s: float = 60.0) -> None:
        found = self.holds[peer].setdefault(key, DictionaryDHTValue())
        found.store(owner, wrap(raw), time.time() + ttl_s)

    async def _call_find_with_blacklist(self, peer: str, key_ids: Collection[DHTID]) -> dict[DHTID, Any] | None:
        self.calls.append((peer, len(key_ids)))
        if peer in self.silent:
            return None
        held = {DHTID.generate(source=key): value for key, value in self.holds[peer].items()}
        told = {place(other): other for other in self.tells.get(peer, ())}
        return {
            key_id: (ValueWithExpiration(held[key_id], time.time() + 60) if key_id in held else None, told)
            for key_id in key_ids
        }


def place(peer: str) -> DHTID:
    return DHTID.generate(source=peer)


async def look_up(node: FakeNode, keys: list[str]) -> dict[str, dict[str, bytes]]:
    lookup = Lookup(node, keys, N_ASKED)
    await lookup.run()
    return lookup.found


async def test_each_peer_is_asked_once_for_all_keys() -> None:
    node = FakeNode("p", "q", "r")
    found = await look_up(node, KEYS)
    assert sorted(node.calls) == [("p", len(KEYS)), ("q", len(KEYS)), ("r", len(KEYS))]
    assert found == {key: {} for key in KEYS}


async def test_more_keys_than_fit_a_call_take_more_calls() -> None:
    node = FakeNode("p")
    keys = [f"run/{i}" for i in range(2 * MAX_KEYS_PER_CALL + 1)]
    node.put("p", keys[-1], "owner", b"last")
    found = await look_up(node, keys)
    assert [n for _, n in node.calls] == [MAX_KEYS_PER_CALL, MAX_KEYS_PER_CALL, 1]
    assert found[keys[-1]] == {"owner": b"last"}


async def test_owners_that_different_peers_know_are_merged_and_the_latest_record_of_each_counts() -> None:
    node = FakeNode("p", "q")
    node.put("p", KEYS[0], "one", b"old", ttl_s=30)
    node.put("q", KEYS[0], "one", b"new", ttl_s=60)
    node.put("q", KEYS[0], "two", b"other")
    node.protocol.storage[DHTID.generate(source=KEYS[0])] = ValueWithExpiration(DictionaryDHTValue(), time.time() + 60)
    node.protocol.storage[DHTID.generate(source=KEYS[0])].value.store("three", wrap(b"own"), time.time() + 60)
    found = await look_up(node, KEYS)
    assert found[KEYS[0]] == {"one": b"new", "two": b"other", "three": b"own"}


async def test_a_peer_that_only_another_knows_is_asked_too() -> None:
    node = FakeNode("p")
    node.tells["p"] = ("far",)
    node.tells["far"] = ("farther", "p")
    node.put("farther", KEYS[3], "owner", b"hidden")
    found = await look_up(node, KEYS)
    assert found[KEYS[3]] == {"owner": b"hidden"}
    assert sorted(peer for peer, _ in node.calls) == ["far", "farther", "p"]


async def test_a_peer_that_does_not_answer_hides_nothing() -> None:
    node = FakeNode("p", "q")
    node.silent = {"p"}
    node.put("q", KEYS[0], "owner", b"here")
    assert (await look_up(node, KEYS))[KEYS[0]] == {"owner": b"here"}


async def test_of_many_peers_only_those_near_a_key_are_asked() -> None:
    peers = [f"peer {i}" for i in range(60)]
    node = FakeNode(*peers)
    nearest = sorted(peers, key=lambda peer: DHTID.generate(source=KEYS[0]).xor_distance(place(peer)))
    for peer in nearest[:N_ASKED]:
        node.put(peer, KEYS[0], peer, b"near")
    found = await look_up(node, KEYS[:1])
    assert {peer for peer, _ in node.calls} == set(nearest[:N_ASKED]) == set(found[KEYS[0]])
