"""What host and trainer sign together, and what nobody can make of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInputError, LimitExceededError
from protocol import receipts_pb2 as pb
from protocol.manifest import ModelConfig
from protocol.receipts import (
    MAX_INTERVAL_S,
    MAX_PAIRS_PER_S,
    MAX_RECEIPT_AGE_S,
    MAX_RECEIPT_BYTES,
    Receipt,
    check_receipt,
    countersign,
    open_claim,
    open_receipt,
    pairs_per_token,
    receipt_digest,
    sign_receipt,
    tokens_learnt,
)
from tests.support.crediting import HOST, NOW_S, RECEIPT, RUN, STRANGER, TRAINER, cut_short, forged, receipt, signed

KEYS = st.binary(min_size=32, max_size=32)
NATURALS = st.integers(min_value=0, max_value=1 << 34)


def test_a_receipt_is_read_as_both_have_signed_it() -> None:
    for what in (RECEIPT, receipt(answers_sha256=bytes(range(32))), receipt(run_id="x" * 128, backward_pairs=0)):
        message = signed(what)
        assert open_receipt(message) == what
        assert len(message.receipt) <= MAX_RECEIPT_BYTES
    assert (RECEIPT.host_id, RECEIPT.trainer_id) == (HOST.peer_id, TRAINER.peer_id)


def test_the_largest_receipt_fits() -> None:
    end_s = 100_000_000_000
    pairs = MAX_PAIRS_PER_S * MAX_INTERVAL_S
    largest = receipt(
        run_id="x" * 128,
        start_s=end_s - MAX_INTERVAL_S,
        end_s=end_s,
        forward_pairs=pairs,
        backward_pairs=pairs,
        answers_sha256=bytes([255] * 32),
    )
    assert open_receipt(signed(largest)) == largest


def test_a_claim_is_no_receipt_until_the_host_has_signed() -> None:
    claim = sign_receipt(TRAINER, RECEIPT)
    assert open_claim(claim) == RECEIPT
    with pytest.raises(InvalidInputError, match="host_signature"):
        open_receipt(claim)
    claim.host_signature = countersign(HOST, claim)
    assert open_receipt(claim) == RECEIPT


def test_nobody_signs_in_anothers_name() -> None:
    with pytest.raises(InvalidInputError, match=r"receipt\.trainer: is not the key that is to sign"):
        sign_receipt(STRANGER, RECEIPT)


@pytest.mark.parametrize("message", cut_short(signed()), ids=["receipt", "trainer", "host"])
def test_a_receipt_that_one_side_alone_has_signed_does_not_hold(message: pb.SignedReceipt) -> None:
    with pytest.raises(InvalidInputError):
        open_receipt(message)


@pytest.mark.parametrize(
    "message",
    [
        forged(by_trainer=STRANGER),
        forged(by_host=STRANGER),
        forged(by_host=TRAINER, by_trainer=HOST),
        forged(by_host=TRAINER),
        forged(by_trainer=HOST),
    ],
    ids=["a stranger for the trainer", "a stranger for the host", "swapped", "the trainer twice", "the host twice"],
)
def test_a_receipt_holds_only_if_each_has_signed_for_his_own_part(message: pb.SignedReceipt) -> None:
    with pytest.raises(InvalidInputError, match="signature"):
        open_receipt(message)


def test_what_one_signed_for_another_part_is_no_signature_here() -> None:
    message = signed()
    swapped = pb.SignedReceipt(
        receipt=message.receipt, trainer_signature=message.host_signature, host_signature=message.trainer_signature
    )
    with pytest.raises(InvalidInputError, match="trainer_signature"):
        open_receipt(swapped)
    message.host_signature = HOST.sign(b"receipt/1", message.receipt)
    with pytest.raises(InvalidInputError, match="host_signature"):
        open_receipt(message)


@pytest.mark.parametrize("field", ["start_s", "end_s", "forward_pairs", "backward_pairs"])
def test_a_receipt_that_somebody_has_changed_does_not_hold(field: str) -> None:
    message = signed()
    said = pb.Receipt.FromString(message.receipt)
    setattr(said, field, getattr(said, field) + 1)
    message.receipt = said.SerializeToString(deterministic=True)
    with pytest.raises(InvalidInputError, match="trainer_signature"):
        open_receipt(message)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run_id": ""}, r"receipt\.run_id"),
        ({"run_id": "x" * 129}, r"receipt\.run_id"),
        ({"host": b"short"}, r"receipt\.host"),
        ({"trainer": bytes(33)}, r"receipt\.trainer"),
        ({"nonce": bytes(15)}, r"receipt\.nonce"),
        ({"answers_sha256": bytes(31)}, r"receipt\.answers_sha256"),
        ({"host": RECEIPT.trainer}, "nobody earns by working for himself"),
        ({"end_s": RECEIPT.start_s}, "is no interval"),
        ({"start_s": RECEIPT.end_s + 1}, "is no interval"),
        ({"end_s": (1 << 64) - 1}, "is no interval"),
        ({"end_s": RECEIPT.start_s + MAX_INTERVAL_S + 1}, "receipt seconds: is 91, but the limit is 90"),
        ({"forward_pairs": 60 * MAX_PAIRS_PER_S + 1}, r"receipt\.forward_pairs: is \d+, but the limit is"),
        ({"backward_pairs": (1 << 64) - 1}, r"receipt\.backward_pairs"),
        ({"forward_pairs": 0, "backward_pairs": 0}, "are both 0"),
    ],
)
def test_a_field_that_cannot_be_is_refused_though_both_have_signed(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        open_receipt(forged(**fields))


def test_a_receipt_has_one_spelling() -> None:
    claim = sign_receipt(TRAINER, RECEIPT)
    claim.receipt += b"\x50\x01"  # a field that no receipt has
    claim.trainer_signature = TRAINER.sign(b"receipt/1", claim.receipt)
    with pytest.raises(InvalidInputError, match="canonical"):
        open_claim(claim)


def test_a_long_receipt_is_refused_unread() -> None:
    with pytest.raises(LimitExceededError, match=f"{MAX_RECEIPT_BYTES}"):
        open_claim(pb.SignedReceipt(receipt=bytes(MAX_RECEIPT_BYTES + 1)))


@given(st.binary(max_size=330), st.binary(max_size=70), st.binary(max_size=70))
def test_any_bytes_are_a_typed_error(raw: bytes, trainer: bytes, host: bytes) -> None:
    with pytest.raises(InvalidInputError):
        open_receipt(pb.SignedReceipt(receipt=raw, trainer_signature=trainer, host_signature=host))


@given(KEYS, KEYS, NATURALS, st.integers(-1, 100), NATURALS, NATURALS)
def test_any_fields_are_a_receipt_or_a_typed_error(
    host: bytes, trainer: bytes, start_s: int, seconds: int, forward: int, backward: int
) -> None:
    try:
        what = receipt(
            host=host,
            trainer=trainer,
            start_s=start_s,
            end_s=start_s + seconds,
            forward_pairs=forward,
            backward_pairs=backward,
        )
    except InvalidInputError:
        return
    assert 0 < what.end_s - what.start_s <= MAX_INTERVAL_S
    assert 0 < what.forward_pairs + what.backward_pairs <= 2 * MAX_PAIRS_PER_S * MAX_INTERVAL_S
    assert what.host != what.trainer


def test_a_receipt_is_good_for_its_run_and_for_thirty_days() -> None:
    check_receipt(RECEIPT, RUN, NOW_S)
    check_receipt(RECEIPT, RUN, RECEIPT.end_s - 60)
    check_receipt(RECEIPT, RUN, RECEIPT.start_s + MAX_RECEIPT_AGE_S)
    with pytest.raises(InvalidInputError, match=r"receipt\.run_id"):
        check_receipt(RECEIPT, "demo-0123456789ac", NOW_S)
    with pytest.raises(InvalidInputError, match=r"receipt\.end_s: is 61 s ahead; check that clocks are right"):
        check_receipt(RECEIPT, RUN, RECEIPT.end_s - 61)
    with pytest.raises(InvalidInputError, match=r"receipt\.start_s: is 2592001 s ago, the limit is 2592000 s"):
        check_receipt(RECEIPT, RUN, RECEIPT.start_s + MAX_RECEIPT_AGE_S + 1)


def test_the_digest_is_that_of_the_receipt_whatever_the_signatures() -> None:
    message = signed()
    assert receipt_digest(message) == receipt_digest(sign_receipt(TRAINER, RECEIPT))
    assert receipt_digest(message) != receipt_digest(signed(receipt(backward_pairs=1001)))


def test_tokens_learnt_are_those_that_have_passed_every_layer_at_every_expert() -> None:
    model = ModelConfig(n_layers=3, experts_per_token=4)
    assert pairs_per_token(model) == 12
    assert [tokens_learnt(pairs, model) for pairs in (0, 11, 12, 120)] == [0, 0, 1, 10]


def test_a_receipt_cannot_be_made_with_a_bad_field() -> None:
    with pytest.raises(LimitExceededError, match="receipt seconds"):
        Receipt(**{**vars(RECEIPT), "end_s": RECEIPT.start_s + 200})
