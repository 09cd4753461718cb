"""Receipts: how many pairs a host has answered for a trainer, signed by both. Pure; times are passed in.

A pair is one token at one expert. A receipt stands for a minute at most. The trainer signs what it got, the host adds
its own signature over the whole, and only both together are worth anything; `docs/credit.md` says what they add up to.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from common.errors import IdentityError, InvalidInputError, LimitExceededError
from protocol import limits
from protocol import receipts_pb2 as pb
from protocol.announcements import MAX_TIME_S
from protocol.call_signature import MAX_AGE_S
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, peer_id_of, verify
from protocol.parsing import parse_message

if TYPE_CHECKING:
    from protocol.identity import Identity
    from protocol.manifest import ModelConfig

CREDIT_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Credit"].full_name
MAX_RECEIPT_BYTES = 320
NONCE_BYTES = 16
STORE_BYTES = 16
ANSWERS_HASH_BYTES = hashlib.sha256().digest_size
MAX_INTERVAL_S = 90
"""A minute, and what a busy machine may be late by."""

MAX_PAIRS_PER_S = 1 << 24
"""In one receipt and one direction, on the mean: beyond what one host computes of experts however small."""

MAX_RECEIPT_AGE_S = 30 * 86_400
"""What is older is neither signed nor credited, and nobody needs to keep it."""

MAX_PAGE_RECEIPTS = 500
MAX_PAGE_BYTES = 256 << 10
"""A whole page: each of its receipts takes less than half a kilobyte."""

_TRAINER_DOMAIN = b"receipt/1"
_HOST_DOMAIN = b"receipt-host/1"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a host answered for a trainer from `start_s` to `end_s`, whole seconds since 1970.

    `host` and `trainer` are raw Ed25519 keys. `answers_sha256` is empty, or a hash of what was answered. Raises
    InvalidInputError naming the first field that cannot be.
    """

    run_id: str
    host: bytes
    trainer: bytes
    start_s: int
    end_s: int
    forward_pairs: int
    backward_pairs: int
    nonce: bytes
    answers_sha256: bytes = b""

    def __post_init__(self) -> None:
        if not 0 < len(self.run_id) <= limits.MAX_RUN_ID_CHARS:
            problem = f"must have 1 to {limits.MAX_RUN_ID_CHARS} characters, has {len(self.run_id)}"
            raise InvalidInputError("receipt.run_id", problem)
        for name, n_bytes in (("host", KEY_BYTES), ("trainer", KEY_BYTES), ("nonce", NONCE_BYTES)):
            _check_length(name, getattr(self, name), n_bytes)
        if self.answers_sha256:
            _check_length("answers_sha256", self.answers_sha256, ANSWERS_HASH_BYTES)
        if self.host == self.trainer:
            raise InvalidInputError("receipt.trainer", "is the host itself: nobody earns by working for himself")
        self._check_interval()
        self._check_pairs()

    @property
    def host_id(self) -> str:
        """The host's peer id."""
        return peer_id_of(self.host)

    @property
    def trainer_id(self) -> str:
        """The trainer's peer id."""
        return peer_id_of(self.trainer)

    def _check_interval(self) -> None:
        if not 0 <= self.start_s < self.end_s <= MAX_TIME_S:
            problem = f"from {self.start_s} to {self.end_s} is no interval since 1970"
            raise InvalidInputError("receipt.start_s, receipt.end_s", problem)
        if self.end_s - self.start_s > MAX_INTERVAL_S:
            raise LimitExceededError("receipt seconds", self.end_s - self.start_s, MAX_INTERVAL_S)

    def _check_pairs(self) -> None:
        most = MAX_PAIRS_PER_S * (self.end_s - self.start_s)
        for name, pairs in (("forward_pairs", self.forward_pairs), ("backward_pairs", self.backward_pairs)):
            if not 0 <= pairs <= most:
                why = f"{MAX_PAIRS_PER_S} a second"
                raise LimitExceededError(f"receipt.{name}", pairs, most, why)
        if not self.forward_pairs and not self.backward_pairs:
            raise InvalidInputError("receipt.forward_pairs, receipt.backward_pairs", "are both 0")


class _Signed(NamedTuple):
    """What somebody must have signed, in which domain, and the field that has the signature."""

    field: str
    domain: bytes
    message: bytes

    def check(self, key: bytes, signature: bytes) -> None:
        try:
            verify(key, self.domain, self.message, signature)
        except IdentityError as error:
            raise InvalidInputError(self.field, str(error)) from None


def sign_receipt(trainer: Identity, receipt: Receipt) -> pb.SignedReceipt:
    """The trainer's claim: a receipt that the host has yet to sign. Raises InvalidInputError for another's receipt."""
    if trainer.public_key != receipt.trainer:
        raise InvalidInputError("receipt.trainer", "is not the key that is to sign")
    raw = _encode(receipt)
    return pb.SignedReceipt(receipt=raw, trainer_signature=trainer.sign(_TRAINER_DOMAIN, raw))


def open_claim(message: pb.SignedReceipt) -> Receipt:
    """What a trainer claims; InvalidInputError unless its signature holds and every field can be."""
    if len(message.receipt) > MAX_RECEIPT_BYTES:
        raise LimitExceededError("receipt bytes", len(message.receipt), MAX_RECEIPT_BYTES)
    receipt = _decode(message.receipt)
    signed = _Signed("trainer_signature", _TRAINER_DOMAIN, message.receipt)
    signed.check(receipt.trainer, message.trainer_signature)
    return receipt


def countersign(host: Identity, claim: pb.SignedReceipt) -> bytes:
    """The host's signature over a claim that it has opened and agrees with."""
    return host.sign(_HOST_DOMAIN, _claimed(claim))


def open_receipt(message: pb.SignedReceipt) -> Receipt:
    """What both have signed; InvalidInputError unless both signatures hold and every field can be."""
    receipt = open_claim(message)
    _Signed("host_signature", _HOST_DOMAIN, _claimed(message)).check(receipt.host, message.host_signature)
    return receipt


def check_receipt(receipt: Receipt, run_id: str, now_s: float) -> None:
    """Raise InvalidInputError unless a receipt is of this run, and neither from the future nor too old.

    `now_s`, in seconds since 1970, may be off by `call_signature.MAX_AGE_S`.
    """
    if receipt.run_id != run_id:
        raise InvalidInputError("receipt.run_id", f"is {receipt.run_id[:60]!r}, not {run_id!r}")
    if receipt.end_s > now_s + MAX_AGE_S:
        raise InvalidInputError("receipt.end_s", f"is {receipt.end_s - now_s:.0f} s ahead; check that clocks are right")
    if receipt.start_s < now_s - MAX_RECEIPT_AGE_S:
        age_s = now_s - receipt.start_s
        raise InvalidInputError("receipt.start_s", f"is {age_s:.0f} s ago, the limit is {MAX_RECEIPT_AGE_S} s")


def receipt_digest(message: pb.SignedReceipt) -> bytes:
    """SHA-256 of what is signed: the same receipt has the same, whoever sends it."""
    return hashlib.sha256(message.receipt).digest()


def pairs_per_token(model: ModelConfig) -> int:
    """The pairs of one token that passes every layer once, one way."""
    return model.n_layers * model.experts_per_token


def tokens_learnt(backward_pairs: int, model: ModelConfig) -> int:
    """The tokens that a trainer has learnt from, going by the backward pairs that hosts confirm."""
    return backward_pairs // pairs_per_token(model)


def _encode(receipt: Receipt) -> bytes:
    return pb.Receipt(
        run_id=receipt.run_id,
        host=receipt.host,
        trainer=receipt.trainer,
        start_s=receipt.start_s,
        end_s=receipt.end_s,
        forward_pairs=receipt.forward_pairs,
        backward_pairs=receipt.backward_pairs,
        nonce=receipt.nonce,
        answers_sha256=receipt.answers_sha256,
    ).SerializeToString(deterministic=True)


def _decode(raw: bytes) -> Receipt:
    message = parse_message(pb.Receipt, raw, "receipt")
    receipt = Receipt(
        run_id=message.run_id,
        host=message.host,
        trainer=message.trainer,
        start_s=message.start_s,
        end_s=message.end_s,
        forward_pairs=message.forward_pairs,
        backward_pairs=message.backward_pairs,
        nonce=message.nonce,
        answers_sha256=message.answers_sha256,
    )
    if _encode(receipt) != raw:
        raise InvalidInputError("receipt", "is not in canonical encoding")
    return receipt


def _claimed(message: pb.SignedReceipt) -> bytes:
    """What a host signs. The first part has one length, so that no two claims share a byte string."""
    if len(message.trainer_signature) != SIGNATURE_BYTES:
        raise InvalidInputError("trainer_signature", f"must be {SIGNATURE_BYTES} bytes")
    return message.trainer_signature + message.receipt


def _check_length(name: str, value: bytes, n_bytes: int) -> None:
    if len(value) != n_bytes:
        raise InvalidInputError(f"receipt.{name}", f"must be {n_bytes} bytes, is {len(value)}")
