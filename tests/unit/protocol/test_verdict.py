"""What an evaluator signs, and what nobody can make of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError
from protocol import contribution_pb2 as pb
from protocol.identity import Identity
from protocol.verdict import (
    MAX_VERDICT_BYTES,
    VERDICT_TTL_S,
    Offered,
    Verdict,
    check_verdict,
    needed_verdicts,
    open_verdict,
    sign_verdict,
    steps_between,
)

NOW_S = 1_800_000_000.0
EVALUATOR = Identity.generate()
OFFERED = Offered(run_id="demo-0123456789ab", layer=1, expert=7, sha256=bytes(32))
VERDICT = Verdict(offered=OFFERED, version=40, n_windows=130, low=1e-3, high=math.inf, issued_s=NOW_S)
FAR_PAST_S = 0.0


def test_a_verdict_is_read_as_it_was_signed() -> None:
    assert open_verdict(sign_verdict(EVALUATOR, VERDICT)) == (EVALUATOR.peer_id, VERDICT)
    assert len(sign_verdict(EVALUATOR, VERDICT).verdict) <= MAX_VERDICT_BYTES


def resigned(field: str, value: float | bytes | str) -> pb.SignedVerdict:
    """By an evaluator whose program does not check its own fields."""
    message = pb.Verdict.FromString(sign_verdict(EVALUATOR, VERDICT).verdict)
    setattr(message, field, value)
    raw = message.SerializeToString()
    signature = EVALUATOR.sign(b"verdict/1", raw)
    return pb.SignedVerdict(verdict=raw, public_key=EVALUATOR.public_key, signature=signature)


@pytest.mark.parametrize("field", ["layer", "expert", "version", "n_windows", "issued_s", "low"])
def test_a_verdict_that_somebody_has_changed_does_not_hold(field: str) -> None:
    signed = sign_verdict(EVALUATOR, VERDICT)
    message = pb.Verdict.FromString(signed.verdict)
    setattr(message, field, getattr(message, field) + 1)
    signed.verdict = message.SerializeToString()
    with pytest.raises(InvalidInputError, match="signature"):
        open_verdict(signed)


def test_a_verdict_is_its_signers_own_and_nothing_else_that_it_signed() -> None:
    signed = sign_verdict(EVALUATOR, VERDICT)
    signed.public_key = Identity.generate().public_key
    with pytest.raises(InvalidInputError, match="signature"):
        open_verdict(signed)
    other = pb.SignedVerdict(verdict=signed.verdict, public_key=EVALUATOR.public_key)
    other.signature = EVALUATOR.sign(b"record/2", signed.verdict)
    with pytest.raises(InvalidInputError, match="signature"):
        open_verdict(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", b"short"),
        ("low", math.nan),
        ("high", math.nan),
        ("issued_s", math.nan),
        ("issued_s", -1.0),
        ("version", 1 << 63),
        ("protocol_version", 0),
        ("run_id", "x" * 129),
    ],
)
def test_a_verdict_with_a_field_that_cannot_be_is_refused_though_its_signature_holds(
    field: str, value: float | bytes | str
) -> None:
    with pytest.raises(InvalidInputError, match=field):
        open_verdict(resigned(field, value))


def test_a_long_verdict_is_refused_unread() -> None:
    with pytest.raises(LimitExceededError, match=f"{MAX_VERDICT_BYTES}"):
        open_verdict(pb.SignedVerdict(verdict=bytes(MAX_VERDICT_BYTES + 1)))


@given(st.binary(max_size=300), st.binary(max_size=40), st.binary(max_size=70))
def test_any_bytes_are_a_typed_error(verdict: bytes, key: bytes, signature: bytes) -> None:
    with pytest.raises(InvalidInputError):
        open_verdict(pb.SignedVerdict(verdict=verdict, public_key=key, signature=signature))


@pytest.mark.parametrize(
    "other",
    [
        replace(OFFERED, sha256=bytes(31) + b"1"),
        replace(OFFERED, expert=8),
        replace(OFFERED, layer=0),
        replace(OFFERED, run_id="demo-0123456789ac"),
    ],
    ids=["file", "expert", "layer", "run"],
)
def test_a_verdict_is_good_for_one_file_in_one_place_of_one_run(other: Offered) -> None:
    check_verdict(VERDICT, OFFERED, NOW_S, FAR_PAST_S)
    with pytest.raises(InvalidInputError, match="another file, place or run"):
        check_verdict(VERDICT, other, NOW_S, FAR_PAST_S)


def test_a_verdict_lapses_and_does_not_begin_in_the_future() -> None:
    check_verdict(VERDICT, OFFERED, NOW_S + VERDICT_TTL_S, FAR_PAST_S)
    check_verdict(VERDICT, OFFERED, NOW_S - 59, FAR_PAST_S)
    for now_s in (NOW_S + VERDICT_TTL_S + 1, NOW_S - 61):
        with pytest.raises(InvalidInputError, match=r"verdict\.issued_s"):
            check_verdict(VERDICT, OFFERED, now_s, FAR_PAST_S)


def test_a_host_that_began_later_may_have_acted_on_it_already() -> None:
    check_verdict(VERDICT, OFFERED, NOW_S + 5, NOW_S - 1)
    with pytest.raises(InvalidInputError, match="before this host began"):
        check_verdict(VERDICT, OFFERED, NOW_S + 5, NOW_S + 1)


def test_two_evaluators_must_agree_where_there_are_two() -> None:
    assert [needed_verdicts(n) for n in range(5)] == [0, 1, 2, 2, 2]


def test_a_block_that_has_taken_many_steps_may_take_more_until_a_verdict_is_stale() -> None:
    assert [steps_between(64, version) for version in (0, 100, 10_000)] == [64, 69, 564]
    assert steps_between(0, 10_000) is None
