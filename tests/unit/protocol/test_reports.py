"""What a trainer says that it measured: fields have ranges, lists are bounded, a wrong one is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RecordError
from protocol import limits, records_pb2
from protocol.records import MAX_RECORD_BYTES, open_record, parse_key, read_payload, reports_key
from protocol.reports import (
    MAX_BITS_PER_BYTE,
    MAX_ENTROPY_BITS,
    MAX_EVALUATIONS,
    MAX_LOAD_CV,
    MAX_REPORT_PAYLOAD_BYTES,
    TrainerReport,
    decode_report,
    encode_report,
)
from tests.support.signing import NOW_S, RUN, forged, signed, unsigned

KEY = reports_key(RUN)
REPORT = TrainerReport(
    step=40,
    run_tokens=81_920,
    train_bits_per_byte=3.566,
    tokens_per_s=19_579.0,
    staleness=1.25,
    calls_ok=320,
    calls_failed=2,
    wire_bytes=84_000_000,
    load_entropy_bits=(4.5, 4.25),
    load_cv=(0.5, 0.75),
    dead_experts=(0, 3),
    evaluated_tokens=(0, 81_920),
    held_out_bits_per_byte=(8.0, 3.5),
)


def changed(**changes: Any) -> bytes:
    """A payload with fields that our own class would refuse."""
    message = records_pb2.TrainerReport.FromString(encode_report(REPORT))
    for name, value in changes.items():
        if isinstance(value, list):
            message.ClearField(name)
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message.SerializeToString()


def test_a_report_has_a_key_of_its_own_and_lives_as_long_as_other_announcements() -> None:
    assert f"{RUN}/reports" == KEY
    assert parse_key(KEY) == (RUN, "reports", None)
    record = open_record(signed(key=KEY, payload=encode_report(REPORT)), key=KEY, now_s=NOW_S)
    assert read_payload(record) == REPORT
    late = signed(key=KEY, payload=encode_report(REPORT), expiration_s=NOW_S + 301)
    with pytest.raises(RecordError, match="ahead, but the limit is 300"):
        open_record(late, key=KEY, now_s=NOW_S)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 0),
        ("format", 2),
        ("step", 1 << 63),
        ("run_tokens", (1 << 62) + 1),
        ("train_bits_per_byte", math.nan),
        ("train_bits_per_byte", -0.5),
        ("train_bits_per_byte", 1e10),
        ("tokens_per_s", math.inf),
        ("tokens_per_s", -1.0),
        ("staleness", math.nan),
        ("staleness", 1e16),
        ("calls_ok", 1 << 63),
        ("calls_failed", 1 << 63),
        ("wire_bytes", 1 << 63),
        ("load_entropy_bits", [math.nan, 1.0]),
        ("load_entropy_bits", [-1.0, 1.0]),
        ("load_entropy_bits", [65.0, 1.0]),
        ("load_cv", [math.inf, 1.0]),
        ("load_cv", [1.0]),
        ("load_cv", [1.0, 1.0, 1.0]),
        ("dead_experts", [0, limits.MAX_EXPERTS_PER_LAYER + 1]),
        ("dead_experts", []),
        ("evaluated_tokens", [0, 1 << 63]),
        ("evaluated_tokens", [5, 5]),
        ("evaluated_tokens", [6, 5]),
        ("held_out_bits_per_byte", [1.0]),
        ("held_out_bits_per_byte", [8.0, math.nan]),
        ("held_out_bits_per_byte", [8.0, -1.0]),
    ],
)
def test_a_report_with_a_wrong_field_is_refused_by_name(field: str, value: Any) -> None:
    payload = changed(**{field: value})
    with pytest.raises(RecordError, match=field):
        decode_report(payload)
    with pytest.raises(RecordError, match=field):
        open_record(forged(unsigned(key=KEY, payload=payload)), key=KEY, now_s=NOW_S)


def test_lists_are_bounded_whatever_they_hold() -> None:
    layers = limits.MAX_LAYERS + 1
    many = {"load_entropy_bits": [1.0] * layers, "load_cv": [1.0] * layers, "dead_experts": [0] * layers}
    with pytest.raises(RecordError, match=r"load_entropy_bits: layers: must be from 0 to 256, is 257"):
        decode_report(changed(**many))
    evaluations = list(range(MAX_EVALUATIONS + 1))
    with pytest.raises(RecordError, match=r"evaluated_tokens: evaluations: must be from 0 to 64, is 65"):
        decode_report(changed(evaluated_tokens=evaluations, held_out_bits_per_byte=[1.0] * len(evaluations)))


def test_the_longest_report_fits_its_payload_and_a_longer_one_is_refused_before_it_is_read() -> None:
    n = limits.MAX_LAYERS
    longest = replace(
        REPORT,
        step=(1 << 63) - 1,
        run_tokens=limits.MAX_RUN_TOKENS,
        calls_ok=(1 << 63) - 1,
        calls_failed=(1 << 63) - 1,
        wire_bytes=(1 << 63) - 1,
        load_entropy_bits=(MAX_ENTROPY_BITS,) * n,
        load_cv=(MAX_LOAD_CV,) * n,
        dead_experts=(limits.MAX_EXPERTS_PER_LAYER,) * n,
        evaluated_tokens=tuple(limits.MAX_RUN_TOKENS - MAX_EVALUATIONS + at for at in range(MAX_EVALUATIONS)),
        held_out_bits_per_byte=(MAX_BITS_PER_BYTE,) * MAX_EVALUATIONS,
    )
    payload = encode_report(longest)
    assert decode_report(payload) == longest
    assert len(payload) <= MAX_REPORT_PAYLOAD_BYTES
    assert len(signed(key=KEY, payload=payload)) <= MAX_RECORD_BYTES
    with pytest.raises(RecordError, match=f"payload: is {MAX_REPORT_PAYLOAD_BYTES + 1} bytes"):
        decode_report(bytes(MAX_REPORT_PAYLOAD_BYTES + 1))
    with pytest.raises(RecordError, match="payload"):
        open_record(forged(unsigned(key=KEY, payload=bytes(5000))), key=KEY, now_s=NOW_S)


def test_our_own_mistakes_are_caught_before_they_are_signed() -> None:
    with pytest.raises(RecordError, match="staleness"):
        replace(REPORT, staleness=math.nan)
    with pytest.raises(RecordError, match="load_cv: must have 2 entries"):
        replace(REPORT, load_cv=(1.0,))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_are_a_report(raw: bytes) -> None:
    try:
        report = decode_report(raw)
    except RecordError:
        return
    assert decode_report(encode_report(report)) == report


fractions = st.floats(0, 64.0, width=32)


@given(
    st.builds(
        TrainerReport,
        step=st.integers(0, (1 << 63) - 1),
        run_tokens=st.integers(0, 1 << 62),
        train_bits_per_byte=st.floats(0, MAX_BITS_PER_BYTE),
        tokens_per_s=st.floats(0, 1e15),
        staleness=st.floats(0, 1e15),
        calls_ok=st.integers(0, (1 << 63) - 1),
        calls_failed=st.integers(0, (1 << 63) - 1),
        wire_bytes=st.integers(0, (1 << 63) - 1),
        load_entropy_bits=st.tuples(fractions, fractions),
        load_cv=st.tuples(fractions, fractions),
        dead_experts=st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)),
        evaluated_tokens=st.just((3, 1 << 60)),
        held_out_bits_per_byte=st.tuples(fractions, fractions),
    )
)
def test_every_report_survives_the_wire(report: TrainerReport) -> None:
    assert decode_report(encode_report(report)) == report
