"""What a lighthouse sees of a run: records from a DHT that may hold anything."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.lighthouse.observer import Observer
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord, encode_block, encode_peer
from protocol.identity import Identity
from protocol.manifest import BlockId
from protocol.records import block_key, encode_manifest, manifest_key, peers_key, sign_record
from tests.support.dht_nodes import MANIFEST, RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from protocol.announcements import ReplicaState, Role
    from protocol.manifest import Manifest


class Records:
    """A DHT that has whatever it was given."""

    def __init__(self) -> None:
        self.by_key: dict[str, dict[str, bytes]] = {}

    def put(self, owner: Identity, key: str, payload: bytes, *, ticket: bytes = b"") -> None:
        raw = sign_record(owner, key=key, version=1, expiration_s=time.time() + 30.0, payload=payload, ticket=ticket)
        self.by_key.setdefault(key, {})[owner.peer_id] = raw

    async def look_up(self, keys: Iterable[str], take: Callable[[str, dict[str, bytes]], None]) -> None:
        for key in keys:
            take(key, self.by_key.get(key, {}))


def run_of(owner: Identity) -> Manifest:
    averaging = replace(MANIFEST.averaging, target_replicas=2)
    return replace(MANIFEST, owner=owner.peer_id, averaging=averaging)


def replica(block: BlockId, state: ReplicaState = "serving", n_experts: int = 4) -> bytes:
    said = BlockRecord(block=block, version=1, endpoint="127.0.0.1:1", n_experts=n_experts, state=state)
    return encode_block(said)


def peer(role: Role) -> bytes:
    return encode_peer(PeerRecord(role=role))


def seen(records: Records, manifest: Manifest) -> tuple[Observer, list[Manifest]]:
    told: list[Manifest] = []
    observer = Observer(records, Admission(manifest.run_id), time.time, told.append)
    asyncio.run(observer.observe())
    return observer, told


def test_peers_are_counted_by_role_and_blocks_by_their_replicas() -> None:
    owner, records = Identity.generate(), Records()
    manifest = run_of(owner)
    run = manifest.run_id
    records.put(owner, manifest_key(run), encode_manifest(manifest))
    hosts = [Identity.generate() for _ in range(2)]
    for host in hosts:
        records.put(host, peers_key(run), peer("host"))
        records.put(host, block_key(run, BlockId(0, 0)), replica(BlockId(0, 0)))
    records.put(owner, peers_key(run), peer("coordinator"))
    observer, told = seen(records, manifest)
    assert told == [manifest]
    assert dict(observer.view.peers) == {"host": 2, "trainer": 0, "coordinator": 1, "lighthouse": 0}
    assert observer.view.n_blocks == {"lost": 1, "few": 0, "full": 1}


def test_a_closed_run_counts_only_its_peers() -> None:
    records, member, admission = Records(), Identity.generate(), Admission(RUN, bytes(range(32)))
    records.put(Identity.generate(), peers_key(RUN), peer("host"))
    records.put(member, peers_key(RUN), peer("host"), ticket=admission.ticket(member.peer_id))
    observer = Observer(records, admission, time.time, lambda _: None)
    asyncio.run(observer.observe())
    assert observer.view.peers["host"] == 1


def test_a_replica_that_cannot_be_called_does_not_count() -> None:
    owner, records = Identity.generate(), Records()
    manifest = run_of(owner)
    run = manifest.run_id
    records.put(owner, manifest_key(run), encode_manifest(manifest))
    for state, n_experts in (("joining", 4), ("stored", 4), ("serving", 3)):
        payload = replica(BlockId(0, 0), state, n_experts)  # type: ignore[arg-type]  # a Literal in a tuple
        records.put(Identity.generate(), block_key(run, BlockId(0, 0)), payload)
    records.put(Identity.generate(), block_key(run, BlockId(0, 1)), replica(BlockId(0, 1)))
    observer, _ = seen(records, manifest)
    assert observer.view.n_blocks == {"lost": 1, "few": 1, "full": 0}


def test_forged_records_and_another_runs_manifest_are_not_believed() -> None:
    owner, records = Identity.generate(), Records()
    manifest = run_of(owner)
    records.put(owner, peers_key(manifest.run_id), peer("host"))
    raw = records.by_key[peers_key(manifest.run_id)][owner.peer_id]
    records.by_key[peers_key(manifest.run_id)] = {Identity.generate().peer_id: raw, owner.peer_id: raw[:-1] + b"x"}
    records.by_key[manifest_key(manifest.run_id)] = {owner.peer_id: raw, "x": b"\xff"}
    observer, told = seen(records, manifest)
    assert told == []
    assert dict(observer.view.peers) == {"host": 0, "trainer": 0, "coordinator": 0, "lighthouse": 0}
    assert observer.view.n_blocks == {"lost": 0, "few": 0, "full": 0}
