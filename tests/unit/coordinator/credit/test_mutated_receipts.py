"""Receipts that were changed, cut, spliced, signed or sent again: whatever is done to them, nothing is credited."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.message import DecodeError

from coordinator.credit.collector import checked_receipt
from protocol import receipts_pb2 as pb
from protocol.identity import Identity
from protocol.receipts import MAX_PAIRS_PER_S, MAX_RECEIPT_AGE_S, countersign
from tests.support.crediting import HOST, NOW_S, RUN, STRANGER, TRAINER, forged, minutes, signed
from tests.support.ledgers import STORE, both, credited, ledger_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Mutation = Callable[[random.Random], bytes]

GENUINE = [signed(one) for one in minutes(20)]
OUTSIDER = Identity.generate()
FIELDS = [field.name for field in pb.Receipt.DESCRIPTOR.fields]
PAGE = 500


def flipped(rng: random.Random) -> bytes:
    """Some bits are others."""
    raw = bytearray(rng.choice(GENUINE).SerializeToString())
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(rng: random.Random) -> bytes:
    """Something is missing, or too much."""
    raw = rng.choice(GENUINE).SerializeToString()
    begin, end = sorted(rng.sample(range(len(raw) + 1), 2))
    return rng.choice([raw[begin:end], raw[:begin] + raw[end:], raw[:end] + raw[begin:]])


def spliced(rng: random.Random) -> bytes:
    """Parts of one and of another."""
    parts = {name: getattr(rng.choice(GENUINE), name) for name in pb.SignedReceipt.DESCRIPTOR.fields_by_name}
    return pb.SignedReceipt(**parts).SerializeToString()


def changed(rng: random.Random) -> bytes:
    """A field says something else; one side has signed that, or a stranger, or neither."""
    message = pb.SignedReceipt.FromString(rng.choice(GENUINE).SerializeToString())
    said = pb.Receipt.FromString(message.receipt)
    name = rng.choice(FIELDS)
    setattr(said, name, other_value(rng, getattr(said, name)))
    message.receipt = said.SerializeToString(deterministic=True)
    signer = rng.choice([None, TRAINER, STRANGER])
    if signer is not None:
        message.trainer_signature = signer.sign(b"receipt/1", message.receipt)
    if signer is not TRAINER:
        message.host_signature = countersign(rng.choice([HOST, STRANGER]), message)
    return message.SerializeToString()


def other_value(rng: random.Random, value: object) -> Any:
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, rng.getrandbits(64)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], ""])
    assert isinstance(value, bytes)
    return rng.choice([rng.randbytes(len(value) or 32), value[1:] or b"x", OUTSIDER.public_key])


def conspired(rng: random.Random) -> bytes:
    """Both have signed what cannot be."""
    start_s = NOW_S - 86_400 * 2 - rng.randrange(86_400)
    impossible: list[dict[str, Any]] = [
        {"start_s": NOW_S + 61 + rng.randrange(10**6), "end_s": NOW_S + 120 + 10**6},
        {"start_s": start_s, "end_s": start_s + rng.randint(91, 10**6)},
        {"start_s": start_s, "end_s": start_s - rng.randrange(100)},
        {"start_s": start_s, "end_s": start_s + 1, "forward_pairs": MAX_PAIRS_PER_S + 1 + rng.getrandbits(40)},
        {"start_s": start_s, "end_s": start_s + 1, "backward_pairs": MAX_PAIRS_PER_S + 1 + rng.getrandbits(40)},
        {"start_s": start_s, "end_s": start_s + 60, "run_id": RUN + rng.choice("xyz")},
        {"start_s": start_s, "end_s": start_s + 60, "trainer": HOST.public_key, "by_trainer": HOST},
        {"start_s": start_s, "end_s": start_s + 60, "nonce": rng.randbytes(rng.choice([0, 15, 17]))},
        {"start_s": start_s, "end_s": start_s + 60, "forward_pairs": 0, "backward_pairs": 0},
        {"start_s": NOW_S - MAX_RECEIPT_AGE_S - 61, "end_s": NOW_S - MAX_RECEIPT_AGE_S - 1},
    ]
    return forged(**rng.choice(impossible)).SerializeToString()


def sent_again(rng: random.Random) -> bytes:
    """Nothing is changed."""
    return rng.choice(GENUINE).SerializeToString()


MUTATIONS: tuple[Mutation, ...] = (flipped, cut, spliced, changed, conspired, sent_again)


def mutants(n: int, seed: int) -> Iterator[pb.SignedReceipt]:
    """So many of those that are a message at all."""
    rng = random.Random(seed)
    while n:
        try:
            yield pb.SignedReceipt.FromString(rng.choice(MUTATIONS)(rng))
        except DecodeError:
            continue
        n -= 1


def more_than_genuine(folder: Path, n: int, seed: int = 1) -> tuple[int, int]:
    """Receipts and pairs that so many mutants add to the genuine ones."""
    with ledger_in(folder, [*both()]) as ledger:

        def take(messages: list[pb.SignedReceipt]) -> int:
            found = [checked_receipt(message, HOST.public_key, RUN, NOW_S) for message in messages]
            return ledger.take([one for one in found if one is not None], HOST.peer_id, STORE, 1)

        assert take(GENUINE) == len(GENUINE)
        before, n_new, page = credited(ledger), 0, list[pb.SignedReceipt]()
        for mutant in mutants(n, seed):
            page.append(mutant)
            if len(page) == PAGE:
                n_new += take(page)
                page = []
        n_new += take(page)
        after = credited(ledger)
    return n_new, sum(after) - sum(before)


def test_two_thousand_mutated_receipts_are_credited_nothing(tmp_path: Path) -> None:
    assert more_than_genuine(tmp_path, 2_000) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_mutated_receipts_are_credited_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    n_new, n_pairs = more_than_genuine(tmp_path, 100_000, seed=2)
    record_property("credited", n_new)
    print(f"{n_new} of 100,000 mutated receipts credited, {n_pairs} pairs")
    assert (n_new, n_pairs) == (0, 0)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_kind_of_mutation_gets_as_far_as_a_check(mutation: Mutation) -> None:
    rng = random.Random(3)
    parsed = 0
    for _ in range(200):
        try:
            parsed += bool(pb.SignedReceipt.FromString(mutation(rng)).receipt)
        except DecodeError:
            continue
    assert parsed > 5
