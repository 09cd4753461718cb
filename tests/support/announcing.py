"""Peers of a small run that announce themselves when a test says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dht.announcer import Announcement, Announcer
from dht.record_store import Entry
from protocol import records_pb2
from protocol.admission import Admission
from protocol.announcements import BlockRecord, PeerRecord, encode_block
from protocol.identity import Identity
from protocol.manifest import TRUNK, BlockId, Manifest, ModelConfig
from protocol.records import block_key, sign_record
from tests.support.signing import forged

if TYPE_CHECKING:
    from protocol.announcements import ReplicaState
    from protocol.reports import TrainerReport
    from tests.support.fake_dht import FakeDht

MODEL = ModelConfig(n_layers=2, experts_per_layer=10, experts_per_block=4)
OWNER = Identity.generate()
MANIFEST = Manifest(name="test", owner=OWNER.peer_id, model=MODEL)
RUN = MANIFEST.run_id
FIRST = BlockId(0, 0)


class Host:
    """A peer whose announcements a test makes by hand; one that announces `TRUNK` is a trainer."""

    def __init__(self, dht: FakeDht, *blocks: BlockId, port: int = 4000) -> None:
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.port = port
        self.steps = 0
        self.blocks = blocks
        self.state: ReplicaState = "serving"
        self.report: TrainerReport | None = None
        self.announcer = Announcer(dht, self.identity, Admission(RUN), describe=self.describe)

    def describe(self) -> Announcement:
        endpoint = f"127.0.0.1:{self.port}"
        blocks = tuple(
            BlockRecord(
                block=block,
                version=self.steps,
                endpoint=endpoint,
                queue_tokens=10,
                tokens_per_s=2.5,
                n_experts=0 if block == TRUNK else len(MODEL.block_experts(block.block)),
                state=self.state,
                divergence=0.25,
            )
            for block in self.blocks
        )
        peer = PeerRecord(
            role="trainer" if TRUNK in self.blocks else "host",
            endpoint=endpoint,
            n_blocks=len(blocks),
            own_tokens=11,
            staleness=1.5,
            exchanged_bytes=1 << 40,
        )
        return Announcement(peer=peer, blocks=blocks, report=self.report)


def entry_of(identity: Identity, block: BlockId, *, version: int, expiration_s: float, **fields: object) -> Entry:
    said = BlockRecord(block=block, version=0, endpoint="127.0.0.1:4000", n_experts=4)
    key = block_key(RUN, block)
    raw = sign_record(
        identity,
        key=key,
        version=version,
        expiration_s=expiration_s,
        payload=encode_block(replace(said, **fields)),  # type: ignore[arg-type]
    )
    return Entry(key, identity.peer_id, raw, expiration_s)


def forged_trunk(identity: Identity, *, n_experts: int, expiration_s: float) -> Entry:
    """A trunk's record with any number of experts, signed by someone whose program does not check its own fields."""
    payload = records_pb2.BlockRecord(trunk=True, n_experts=n_experts, endpoint="127.0.0.1:4000").SerializeToString()
    message = records_pb2.SignedRecord(
        key=block_key(RUN, TRUNK), subkey=identity.peer_id, version=1, expiration_s=expiration_s, payload=payload
    )
    return Entry(message.key, identity.peer_id, forged(message, identity), expiration_s)
