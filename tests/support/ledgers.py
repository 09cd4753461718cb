"""Ledgers for tests: opened in a folder, told who is in the run, given receipts as if they had been collected."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from coordinator.credit.ledger import Checked, Ledger
from coordinator.credit.members import RunMember
from coordinator.credit.sums import read_sums
from protocol.endpoints import Address
from protocol.manifest import ModelConfig
from protocol.receipts import receipt_digest, sign_receipt
from tests.support.crediting import HOST, RUN, STRANGER, TRAINER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from coordinator.credit.sums import CreditSums
    from protocol.identity import Identity
    from protocol.receipts import Receipt

MODEL = ModelConfig(n_layers=2, experts_per_token=5)
"""Ten pairs for each token."""

MANY_TOKENS = 1 << 40
STORE = bytes(range(16))


def member(identity: Identity, role: str, own_tokens: int = 0) -> RunMember:
    return RunMember(Address(identity.peer_id, "192.0.2.1:4000"), role, own_tokens)


def both(own_tokens: int = MANY_TOKENS) -> list[RunMember]:
    """HOST and TRAINER, as they announce themselves."""
    return [member(HOST, "host"), member(TRAINER, "trainer", own_tokens)]


def checked(receipt: Receipt) -> Checked:
    trainer = next(one for one in (TRAINER, STRANGER) if one.public_key == receipt.trainer)
    return Checked(receipt, receipt_digest(sign_receipt(trainer, receipt)))


@contextmanager
def ledger_in(folder: Path, members: Iterable[RunMember] = (), run_id: str = RUN) -> Iterator[Ledger]:
    ledger = Ledger(folder, run_id)
    ledger.open()
    try:
        ledger.see(members)
        yield ledger
    finally:
        ledger.close()


def take(ledger: Ledger, receipts: Iterable[Receipt], source: Identity = HOST) -> int:
    """How many were new."""
    return ledger.take([checked(receipt) for receipt in receipts], source.peer_id, STORE, 1)


def sums_of(ledger: Ledger) -> CreditSums:
    return read_sums(ledger, RUN, MODEL)


def credited(ledger: Ledger) -> tuple[int, int, int]:
    """Forward and backward pairs of all hosts, and their receipts."""
    hosts = sums_of(ledger).hosts
    return (
        sum(host.forward_pairs for host in hosts),
        sum(host.backward_pairs for host in hosts),
        sum(host.receipts for host in hosts),
    )
