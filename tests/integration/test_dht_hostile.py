"""Real DHT nodes against peers that forge, lie and flood."""

from __future__ import annotations

import time

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue

from dht.record_store import Entry
from protocol.announcements import BlockRecord, encode_block
from protocol.identity import Identity
from protocol.manifest import TRUNK, BlockId
from protocol.records import block_key, peers_key, sign_record
from tests.support.dht_nodes import KEY, MANIFEST, MODEL, RUN, Start, entry_by


@pytest.mark.parametrize("damage", ["flipped bit", "another key", "another owner", "longer life", "not a record"])
async def test_a_forged_record_is_refused_by_the_node_that_would_store_it(start: Start, damage: str) -> None:
    good = entry_by(Identity.generate())
    bad = {
        "flipped bit": good._replace(value=good.value[:-1] + bytes([good.value[-1] ^ 1])),
        "another key": good._replace(key=f"{RUN}/0/1"),
        "another owner": good._replace(subkey=Identity.generate().peer_id),
        "longer life": good._replace(expiration_s=good.expiration_s + 10),
        "not a record": good._replace(value=b"x" * 100),
    }[damage]
    honest = await start()
    mallory = await start(honest)
    # An attacker's own node checks nothing, and keeps nothing for itself, so that all depends on the honest one.
    mallory._parts.node.protocol.record_validator = None
    stored = await mallory._parts.node.store_many(
        [bad.key], [bad.value], [bad.expiration_s], subkeys=[bad.subkey], exclude_self=True
    )
    assert stored == {(bad.key, bad.subkey): False}
    assert await honest.get_many([bad.key]) == {bad.key: {}}
    assert len(honest._parts.node.protocol.storage) == 0


async def test_a_value_without_a_sub_key_is_refused(start: Start) -> None:
    honest = await start()
    mallory = await start(honest)
    mallory._parts.node.protocol.record_validator = None
    good = entry_by(Identity.generate())
    assert not await mallory._parts.node.store(good.key, good.value, good.expiration_s, exclude_self=True)
    assert len(honest._parts.node.protocol.storage) == 0


async def test_a_lying_node_hides_nobody_and_breaks_nothing(start: Start) -> None:
    honest = await start()
    mallory = await start(honest)
    reader = await start(honest)
    entry = entry_by(Identity.generate())
    assert await honest.store_many([entry]) == (True,)
    lies = DictionaryDHTValue("no number")
    with lies.freeze():
        lies.store("x", b"not a record", time.time() + 10)
    storage = mallory._parts.node.protocol.storage
    for key in (KEY, f"{RUN}/0/0"):
        storage.data[DHTID.generate(key)] = _Lie(lies)
    assert await reader.get_many([KEY, f"{RUN}/0/0"]) == {KEY: {entry.subkey: entry.value}, f"{RUN}/0/0": {}}


class _Lie:
    """A stored dictionary that claims to live for ever, which would end hivemind's search at once."""

    expiration_time = float("inf")

    def __init__(self, value: DictionaryDHTValue) -> None:
        self.value = value


async def test_a_node_that_serves_one_run_stores_no_other(start: Start) -> None:
    node = await start()
    node.serve_only(MANIFEST)
    mine, owner = entry_by(Identity.generate()), Identity.generate()
    assert await node.store_many([mine]) == (True,)
    assert await node.store_many([block_entry(owner, TRUNK)]) == (True,)
    assert await node.store_many([entry_by(owner, key=peers_key("other-0123456789ab"))]) == (False,)
    no_such = BlockId(0, MODEL.blocks_per_layer)
    assert await node.store_many([block_entry(owner, no_such)]) == (False,)


def block_entry(owner: Identity, block: BlockId) -> Entry:
    payload = encode_block(BlockRecord(block=block, version=0, endpoint="127.0.0.1:1"))
    key, expiration_s = block_key(RUN, block), time.time() + 10
    raw = sign_record(owner, key=key, version=1, expiration_s=expiration_s, payload=payload)
    return Entry(key, owner.peer_id, raw, expiration_s)
