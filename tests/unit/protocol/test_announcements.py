"""What peers say about themselves: every field has its range, and a wrong one is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RecordError
from protocol import records_pb2
from protocol.announcements import (
    MAX_ANNOUNCE_PAYLOAD_BYTES,
    MAX_DIVERGENCE,
    MAX_EVALUATORS,
    MAX_STALENESS,
    PAUSE_CAUSES,
    REPLICA_STATES,
    BlockRecord,
    PeerRecord,
    decode_block,
    decode_peer,
    encode_block,
    encode_peer,
)
from protocol.identity import Identity
from protocol.manifest import TRUNK, BlockId
from protocol.records import block_key, open_record, parse_key, read_payload
from tests.support.signing import BLOCK, KEY, NOW_S, OWNER, PEER, RUN, forged, signed, unsigned


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_per_s", math.nan),
        ("tokens_per_s", math.inf),
        ("tokens_per_s", -1.0),
        ("version", 1 << 63),
        ("tokens_total", 1 << 63),
        ("n_experts", 1 << 31),
        ("layer", 256),
        ("block", 1 << 31),
        ("endpoint", ""),
        ("endpoint", "192.0.2.1"),
        ("endpoint", "192.0.2.1:0"),
        ("endpoint", "192.0.2.1:65536"),
        ("endpoint", "192.0.2.1:+80"),
        ("endpoint", "\x1b[31mred:80"),
        ("endpoint", "a b:80"),
        ("endpoint", "unix:/etc/passwd:80"),
        ("endpoint", f"{'a' * 256}:80"),
        ("state", 3),
        ("state", -1),
        ("divergence", math.nan),
        ("divergence", math.inf),
        ("divergence", -0.5),
        ("divergence", 1e10),
        ("layer", 1 << 31),
    ],
)
def test_a_block_with_a_wrong_field_is_refused_by_name(field: str, value: float | str) -> None:
    message = records_pb2.BlockRecord.FromString(encode_block(BLOCK))
    setattr(message, field, value)
    payload = message.SerializeToString()
    with pytest.raises(RecordError, match=field):
        decode_block(payload)
    with pytest.raises(RecordError, match=field):
        open_record(forged(unsigned(payload=payload)), key=KEY, now_s=NOW_S)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "router"),
        ("role", ""),
        ("endpoint", "nowhere"),
        ("software", "x" * 65),
        ("software", "kilohive\n\x1b[2J"),
        ("started_s", math.nan),
        ("started_s", -1.0),
        ("tokens_per_s", math.inf),
        ("run_tokens", 1 << 63),
        ("own_tokens", (1 << 62) + 1),
        ("staleness", math.nan),
        ("staleness", math.inf),
        ("staleness", -1.0),
        ("staleness", 1e16),
        ("exchanged_bytes", 1 << 63),
        ("pause_cause", 5),
        ("paused_since_s", math.nan),
        ("paused_until_s", -1.0),
        ("paused_until_s", 1e12),
    ],
)
def test_a_peer_with_a_wrong_field_is_refused_by_name(field: str, value: float | str) -> None:
    message = records_pb2.PeerRecord.FromString(encode_peer(PEER))
    setattr(message, field, value)
    with pytest.raises(RecordError, match=field):
        decode_peer(message.SerializeToString())


def test_our_own_mistakes_are_caught_before_they_are_signed() -> None:
    with pytest.raises(RecordError, match="tokens_per_s"):
        replace(BLOCK, tokens_per_s=math.nan)
    with pytest.raises(RecordError, match="queue_tokens"):
        replace(BLOCK, queue_tokens=1 << 32)
    with pytest.raises(RecordError, match="role"):
        PeerRecord(role="router")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="state: must be one of serving, joining, stored, is 'resting'"):
        replace(BLOCK, state="resting")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="pause_cause: must be one of none, owner, condition"):
        replace(PEER, pause_cause="weather")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="divergence"):
        replace(BLOCK, divergence=math.nan)
    with pytest.raises(RecordError, match="layer"):
        replace(BLOCK, block=BlockId(-2, 0))


def test_a_peer_says_whether_it_is_paused_whose_doing_that_is_since_when_and_until_when() -> None:
    assert PAUSE_CAUSES == ("none", "owner", "condition", "device", "sleep")
    for cause in PAUSE_CAUSES:
        said = replace(PEER, paused=cause != "none", pause_cause=cause, paused_since_s=1000.5, paused_until_s=4600.0)
        assert decode_peer(encode_peer(said)) == said
    names = records_pb2.PauseCause.keys()
    assert names == ["NOT_PAUSED", *(f"BY_{cause.upper()}" for cause in PAUSE_CAUSES[1:])]


def test_a_pause_of_a_version_that_says_no_more_is_a_pause() -> None:
    said = decode_peer(records_pb2.PeerRecord(role="host", paused=True).SerializeToString())
    assert (said.paused, said.pause_cause, said.paused_since_s, said.paused_until_s) == (True, "none", 0.0, 0.0)


def test_a_state_is_a_number_of_the_proto() -> None:
    names = records_pb2.ReplicaState.keys()
    assert [name.lower() for name in names] == list(REPLICA_STATES)
    assert records_pb2.BlockRecord.FromString(encode_block(replace(BLOCK, state="stored"))).state == records_pb2.STORED


TRUNK_RECORD = BlockRecord(block=TRUNK, version=7, endpoint="192.0.2.1:4000")
TRUNK_KEY = block_key(RUN, TRUNK)


def test_a_trunks_record_has_a_key_of_its_own() -> None:
    assert f"{RUN}/trunk" == TRUNK_KEY
    assert parse_key(TRUNK_KEY) == (RUN, "block", TRUNK)
    record = open_record(signed(key=TRUNK_KEY, payload=encode_block(TRUNK_RECORD)), key=TRUNK_KEY, now_s=NOW_S)
    assert read_payload(record) == TRUNK_RECORD
    with pytest.raises(RecordError, match="ahead, but the limit is 300"):
        open_record(
            signed(key=TRUNK_KEY, payload=encode_block(TRUNK_RECORD), expiration_s=NOW_S + 301),
            key=TRUNK_KEY,
            now_s=NOW_S,
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_experts": 4}, "n_experts: must be from 0 to 0, is 4"),
        ({"layer": 1}, "layer: the trunk has none, is 1/0"),
        ({"block": 3}, "layer: the trunk has none, is 0/3"),
        ({"trunk": False}, "the payload is about 0/0, its key about trunk"),
    ],
)
def test_a_trunk_that_says_what_only_a_block_can_is_refused(changes: dict[str, int], sentence: str) -> None:
    message = records_pb2.BlockRecord.FromString(encode_block(TRUNK_RECORD))
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(RecordError, match=sentence):
        open_record(forged(unsigned(key=TRUNK_KEY, payload=message.SerializeToString())), key=TRUNK_KEY, now_s=NOW_S)


def test_a_trunk_is_no_block_of_the_grid() -> None:
    trunk = forged(unsigned(key=block_key(RUN, BlockId(0, 0)), payload=encode_block(TRUNK_RECORD)))
    with pytest.raises(RecordError, match="the payload is about trunk, its key about 0/0"):
        open_record(trunk, key=block_key(RUN, BlockId(0, 0)), now_s=NOW_S)
    with pytest.raises(RecordError, match="n_experts"):
        replace(BLOCK, block=TRUNK)


finite = st.floats(0, 1e15, allow_nan=False)


@given(
    st.builds(
        BlockRecord,
        block=st.builds(BlockId, st.integers(0, 255), st.integers(0, (1 << 20) - 1)),
        version=st.integers(0, (1 << 63) - 1),
        endpoint=st.sampled_from(["127.0.0.1:1", "host-1.example.org:65535", "[::1]:4000"]),
        queue_tokens=st.integers(0, (1 << 32) - 1),
        tokens_per_s=finite,
        tokens_total=st.integers(0, 1 << 62),
        n_experts=st.integers(0, 1 << 20),
        state=st.sampled_from(REPLICA_STATES),
        divergence=st.floats(0, MAX_DIVERGENCE, width=32),
    )
    | st.builds(
        BlockRecord,
        block=st.just(TRUNK),
        version=st.integers(0, (1 << 63) - 1),
        endpoint=st.just("127.0.0.1:1"),
        state=st.sampled_from(REPLICA_STATES),
        divergence=st.floats(0, MAX_DIVERGENCE, width=32),
    )
)
def test_every_block_record_survives_the_wire(record: BlockRecord) -> None:
    assert decode_block(encode_block(record)) == record


@given(
    st.builds(
        PeerRecord,
        role=st.sampled_from(["host", "trainer", "coordinator"]),
        endpoint=st.sampled_from(["", "127.0.0.1:1"]),
        software=st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=64),
        started_s=st.floats(0, 1e11),
        n_blocks=st.integers(0, (1 << 32) - 1),
        tokens_per_s=finite,
        run_tokens=st.integers(0, 1 << 62),
        queue_tokens=st.integers(0, (1 << 32) - 1),
        own_tokens=st.integers(0, 1 << 62),
        staleness=st.floats(0, float(1 << 49), width=32),
        exchanged_bytes=st.integers(0, (1 << 63) - 1),
    )
)
def test_every_peer_record_survives_the_wire(record: PeerRecord) -> None:
    assert decode_peer(encode_peer(record)) == record


def test_the_largest_fractions_survive_their_rounding_to_32_bits() -> None:
    assert decode_block(encode_block(replace(BLOCK, divergence=MAX_DIVERGENCE))).divergence == MAX_DIVERGENCE
    assert decode_peer(encode_peer(replace(PEER, staleness=MAX_STALENESS))).staleness <= MAX_STALENESS


EVALUATORS = tuple(Identity.generate().peer_id for _ in range(MAX_EVALUATORS))


def test_the_owner_can_name_a_few_evaluators_beside_everything_else_it_says() -> None:
    said = replace(PEER, role="coordinator", evaluators=EVALUATORS, relay="/ip4/192.0.2.1/udp/4001/quic-v1")
    payload = encode_peer(said)
    assert decode_peer(payload) == said
    assert len(payload) <= MAX_ANNOUNCE_PAYLOAD_BYTES


@pytest.mark.parametrize(
    "named",
    [(*EVALUATORS, OWNER.peer_id), EVALUATORS[:1] * 2, ("12D3KooW",), ("\x1b[31mred" * 5,)],
    ids=["too many", "one twice", "too short", "no peer id"],
)
def test_evaluators_that_cannot_be_are_refused_by_name(named: tuple[str, ...]) -> None:
    message = records_pb2.PeerRecord.FromString(encode_peer(PEER))
    message.evaluators.extend(named)
    with pytest.raises(RecordError, match="evaluators"):
        decode_peer(message.SerializeToString())
