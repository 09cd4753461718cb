"""Receipts as hosts and trainers sign them, and as cheats would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol import receipts_pb2 as pb
from protocol.identity import Identity
from protocol.receipts import NONCE_BYTES, Receipt, countersign, sign_receipt

NOW_S = 1_800_000_000
RUN = "demo-0123456789ab"
HOST, TRAINER, STRANGER = (Identity.generate() for _ in range(3))
RECEIPT = Receipt(
    run_id=RUN,
    host=HOST.public_key,
    trainer=TRAINER.public_key,
    start_s=NOW_S - 600,
    end_s=NOW_S - 540,
    forward_pairs=2000,
    backward_pairs=1000,
    nonce=bytes(NONCE_BYTES),
)


def receipt(**changes: Any) -> Receipt:
    """That of HOST and TRAINER, ten minutes ago, with some other fields."""
    return replace(RECEIPT, **changes)


def minutes(n: int, **changes: Any) -> list[Receipt]:
    """So many of one pair of peers, one after the other, each with a nonce of its own."""
    return [
        receipt(start_s=NOW_S - 86_400 + 60 * i, end_s=NOW_S - 86_340 + 60 * i, nonce=i.to_bytes(16, "big"), **changes)
        for i in range(n)
    ]


def signed(what: Receipt = RECEIPT, host: Identity = HOST, trainer: Identity = TRAINER) -> pb.SignedReceipt:
    """By both."""
    claim = sign_receipt(trainer, what)
    claim.host_signature = countersign(host, claim)
    return claim


def forged(by_host: Identity = HOST, by_trainer: Identity = TRAINER, **fields: Any) -> pb.SignedReceipt:
    """By both, with fields that `Receipt` would refuse: their programs do not check what they sign."""
    message = pb.Receipt.FromString(sign_receipt(TRAINER, RECEIPT).receipt)
    for name, value in fields.items():
        setattr(message, name, value)
    claim = pb.SignedReceipt(receipt=message.SerializeToString(deterministic=True))
    claim.trainer_signature = by_trainer.sign(b"receipt/1", claim.receipt)
    claim.host_signature = countersign(by_host, claim)
    return claim


def cut_short(message: pb.SignedReceipt) -> list[pb.SignedReceipt]:
    """The message without one of its three parts."""
    parts: dict[str, bytes] = {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
    return [pb.SignedReceipt(**{**parts, name: b""}) for name in parts]
