"""Records: what is signed is what is read, and nothing else gets through."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ManifestError, RecordError
from protocol import records_pb2
from protocol.admission import Admission
from protocol.announcements import encode_block
from protocol.identity import Identity
from protocol.manifest import HASH_CHARS, BlockId, Manifest
from protocol.records import (
    MAX_ANNOUNCE_TTL_S,
    MAX_MANIFEST_TTL_S,
    MAX_RECORD_BYTES,
    block_key,
    decode_manifest,
    encode_manifest,
    manifest_key,
    open_record,
    parse_key,
    peers_key,
    read_payload,
)
from tests.support.signing import BLOCK, KEY, NOW_S, OWNER, RUN, forged, signed, unsigned

CLOSED = Admission(RUN, bytes(range(32)))
TICKET = CLOSED.ticket(OWNER.peer_id)


def test_a_record_opens_as_it_was_signed() -> None:
    record = open_record(signed(), key=KEY, now_s=NOW_S)
    assert (record.key, record.owner, record.version, record.expiration_s) == (KEY, OWNER.peer_id, 3, NOW_S + 20)
    assert read_payload(record) == BLOCK
    assert not record.withdrawn


def test_an_empty_payload_withdraws() -> None:
    record = open_record(signed(payload=b""), key=KEY, now_s=NOW_S)
    assert record.withdrawn
    assert read_payload(record) is None


@given(st.data())
def test_any_mutation_of_a_signed_record_is_refused(data: st.DataObject) -> None:
    raw = signed()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(start + 8, len(raw))))
    mutated = raw[:start] + data.draw(st.binary(max_size=8)) + raw[end:]
    if mutated == raw:
        return
    with pytest.raises(RecordError):
        open_record(mutated, key=KEY, now_s=NOW_S)


def test_every_flipped_bit_is_refused() -> None:
    raw = signed()
    for position in range(len(raw)):
        for bit in range(8):
            mutated = bytearray(raw)
            mutated[position] ^= 1 << bit
            with pytest.raises(RecordError):
                open_record(bytes(mutated), key=KEY, now_s=NOW_S)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_record(raw: bytes) -> None:
    with pytest.raises(RecordError):
        open_record(raw, key=KEY, now_s=NOW_S)


def test_another_spelling_of_the_same_record_is_refused() -> None:
    raw = signed()
    unknown_field = raw + b"\xf8\x7f\x01"
    repeated_field = raw + b"\x18\x03"
    assert records_pb2.SignedRecord.FromString(repeated_field) == records_pb2.SignedRecord.FromString(raw)
    for spelling in (unknown_field, repeated_field):
        with pytest.raises(RecordError, match="canonical"):
            open_record(spelling, key=KEY, now_s=NOW_S)


def test_an_oversize_record_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RecordError, match=f"is {MAX_RECORD_BYTES + 1} bytes, but the limit is {MAX_RECORD_BYTES}"):
        open_record(b"\xff" * (MAX_RECORD_BYTES + 1), key=KEY, now_s=NOW_S)


def test_an_oversize_payload_is_refused_although_it_is_signed() -> None:
    with pytest.raises(RecordError, match="payload: is 513 bytes, but the limit is 512"):
        open_record(forged(unsigned(payload=b"x" * 513)), key=KEY, now_s=NOW_S)


def test_a_record_for_another_key_is_refused() -> None:
    with pytest.raises(RecordError, match="is signed for"):
        open_record(signed(), key=block_key(RUN, BlockId(1, 4)), now_s=NOW_S)


def test_a_payload_about_another_block_than_its_key_is_refused() -> None:
    other = encode_block(replace(BLOCK, block=BlockId(0, 3)))
    with pytest.raises(RecordError, match="the payload is about 0/3, its key about 1/3"):
        open_record(forged(unsigned(payload=other)), key=KEY, now_s=NOW_S)


def test_nobody_signs_for_somebody_else() -> None:
    mallory = Identity.generate()
    with pytest.raises(RecordError, match="not the peer id of the public key"):
        open_record(forged(unsigned(), signer=mallory), key=KEY, now_s=NOW_S)
    claimed = forged(unsigned(subkey=mallory.peer_id), signer=mallory)
    assert open_record(claimed, key=KEY, now_s=NOW_S).owner == mallory.peer_id  # as themselves they may


@pytest.mark.parametrize("left_s", [0.0, -0.001, -1e6])
def test_an_expired_record_is_refused(left_s: float) -> None:
    with pytest.raises(RecordError, match="expired"):
        open_record(signed(expiration_s=NOW_S + left_s), key=KEY, now_s=NOW_S)


def test_a_record_that_expires_too_far_ahead_is_refused() -> None:
    open_record(signed(expiration_s=NOW_S + MAX_ANNOUNCE_TTL_S), key=KEY, now_s=NOW_S)
    with pytest.raises(RecordError, match="ahead, but the limit is 300"):
        open_record(signed(expiration_s=NOW_S + MAX_ANNOUNCE_TTL_S + 0.1), key=KEY, now_s=NOW_S)


@pytest.mark.parametrize("expiration_s", [math.nan, math.inf, -math.inf, -1.0])
def test_a_time_that_is_none_is_refused(expiration_s: float) -> None:
    with pytest.raises(RecordError, match="expiration_s"):
        open_record(forged(unsigned(expiration_s=expiration_s)), key=KEY, now_s=NOW_S)
    with pytest.raises(RecordError, match="expiration_s"):
        signed(expiration_s=expiration_s)


@given(st.builds(BlockId, st.integers(0, 255), st.integers(0, (1 << 20) - 1)))
def test_a_key_taken_apart_is_the_key_that_was_built(block: BlockId) -> None:
    assert parse_key(block_key(RUN, block)) == (RUN, "block", block)
    assert parse_key(peers_key(RUN)) == (RUN, "peers", None)
    assert parse_key(manifest_key(RUN)) == (RUN, "manifest", None)


@pytest.mark.parametrize(
    "key",
    [
        "",
        RUN,
        f"{RUN}/",
        f"{RUN}/other",
        f"{RUN}/trunk/0",
        f"{RUN}/Trunk",
        f"{RUN}/1",
        f"{RUN}/01/2",
        f"{RUN}/1/02",
        f"{RUN}/1/2/3",
        f"{RUN}/-1/2",
        f"{RUN}/256/0",
        f"{RUN}/0/1048576",
        f"{RUN}/1/٢",
        f"{RUN}/peers\n",
        f"{'x' * 129}/1/2",
        "/1/2",
        "a b/peers",
        "é/peers",
    ],
)
def test_no_other_text_is_a_key(key: str) -> None:
    with pytest.raises(RecordError, match="key"):
        parse_key(key)


def manifest_record(manifest: Manifest, run_id: str, signer: Identity = OWNER) -> bytes:
    message = unsigned(
        key=manifest_key(run_id),
        subkey=signer.peer_id,
        expiration_s=NOW_S + MAX_MANIFEST_TTL_S,
        payload=encode_manifest(manifest),
    )
    return forged(message, signer)


def test_a_manifest_is_proven_by_the_run_id_that_names_it() -> None:
    manifest = Manifest(name="demo", owner=OWNER.peer_id, seed=5)
    raw = manifest_record(manifest, manifest.run_id)
    record = open_record(raw, key=manifest_key(manifest.run_id), now_s=NOW_S)
    assert decode_manifest(record) == manifest


def test_another_manifest_under_the_same_run_id_is_refused() -> None:
    manifest = Manifest(name="demo", owner=OWNER.peer_id)
    raw = manifest_record(replace(manifest, seed=1), manifest.run_id)
    with pytest.raises(RecordError, match="is not the one that run id"):
        open_record(raw, key=manifest_key(manifest.run_id), now_s=NOW_S)


def test_a_manifest_under_another_name_is_refused() -> None:
    manifest = Manifest(name="demo", owner=OWNER.peer_id)
    run_id = manifest.run_id.replace("demo", "other")
    with pytest.raises(RecordError, match="names another run"):
        open_record(manifest_record(manifest, run_id), key=manifest_key(run_id), now_s=NOW_S)


def test_a_manifest_that_its_owner_did_not_sign_is_refused() -> None:
    manifest = Manifest(name="demo", owner=OWNER.peer_id)
    raw = manifest_record(manifest, manifest.run_id, signer=Identity.generate())
    with pytest.raises(RecordError, match="another owner"):
        open_record(raw, key=manifest_key(manifest.run_id), now_s=NOW_S)


def _record_of_text(toml: str, name: str = "demo") -> tuple[str, bytes]:
    key = manifest_key(f"{name}-{hashlib.sha256(toml.encode()).hexdigest()[:HASH_CHARS]}")
    payload = records_pb2.ManifestRecord(toml=toml).SerializeToString()
    return key, forged(unsigned(key=key, payload=payload))


@pytest.mark.parametrize(
    "toml",
    ["x = ", "x = " + "[" * 4000, "x = 1" + "0" * 5000, "x = 1", 'name = "demo"\nowner = 1'],
    ids=["not TOML", "deep", "huge number", "no name", "no owner"],
)
def test_hostile_text_with_the_right_hash_is_refused(toml: str) -> None:
    key, raw = _record_of_text(toml)
    with pytest.raises(RecordError, match="manifest of demo"):
        open_record(raw, key=key, now_s=NOW_S)


@pytest.mark.parametrize(
    "line",
    ["protocol_version = 999", "seed = -1", "[model]\nd_model = 1" + "0" * 400],
    ids=["newer version", "out of range", "beyond a float"],
)
def test_a_manifest_that_this_program_cannot_read_says_why(line: str) -> None:
    key, raw = _record_of_text(f'name = "demo"\nowner = "{OWNER.peer_id}"\n{line}')
    record = open_record(raw, key=key, now_s=NOW_S)
    with pytest.raises(ManifestError):
        decode_manifest(record)


@pytest.mark.parametrize("key", [KEY, peers_key(RUN), f"{RUN}/trunk"])
def test_a_closed_run_takes_records_with_their_owners_ticket_only(key: str) -> None:
    for ticket in (b"", CLOSED.ticket(Identity.generate().peer_id), bytes(32)):
        raw = signed(key=key, payload=b"", ticket=ticket)
        with pytest.raises(RecordError, match="ticket: this run admits only those with its invite"):
            open_record(raw, key=key, now_s=NOW_S, admission=CLOSED)
        assert open_record(raw, key=key, now_s=NOW_S).ticket == ticket  # who is not in the run cannot tell
    raw = signed(key=key, payload=b"", ticket=TICKET)
    assert open_record(raw, key=key, now_s=NOW_S, admission=CLOSED).ticket == TICKET


def test_a_manifest_needs_no_ticket() -> None:
    manifest = Manifest(name="demo", owner=OWNER.peer_id)
    raw = manifest_record(manifest, manifest.run_id)
    admission = replace(CLOSED, run_id=manifest.run_id)
    record = open_record(raw, key=manifest_key(manifest.run_id), now_s=NOW_S, admission=admission)
    assert decode_manifest(record) == manifest


@pytest.mark.parametrize("length", [1, 31, 33])
def test_a_ticket_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(RecordError, match=f"ticket: must be 32 bytes or none, is {length}"):
        signed(ticket=b"x" * length)
    with pytest.raises(RecordError, match=f"ticket: must be 32 bytes or none, is {length}"):
        open_record(forged(unsigned(ticket=b"x" * length)), key=KEY, now_s=NOW_S)


def test_a_ticket_can_neither_be_taken_off_nor_put_on_nor_spelled_otherwise() -> None:
    bare, shown = signed(), signed(ticket=TICKET)
    field = b"\x4a\x20" + TICKET
    assert shown.endswith(field)
    for raw in (shown.removesuffix(field), bare + field):
        with pytest.raises(RecordError, match="signature: does not match"):
            open_record(raw, key=KEY, now_s=NOW_S)
    for raw in (bare + b"\x4a\x00", field + shown.removesuffix(field)):
        with pytest.raises(RecordError, match="canonical"):
            open_record(raw, key=KEY, now_s=NOW_S)
