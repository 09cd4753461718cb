"""The calls about receipts: who is answered what, and what is said when the disk does not work."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import (
    DeadlineError,
    InvalidInputError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownRunError,
)
from node.credit.call_quota import MAX_CALLS
from node.credit.service import CreditService
from node.credit.store import ReceiptStore
from protocol import receipts_pb2 as pb
from protocol.call_signature import CallSigner
from protocol.profile import Profile, open_profile
from protocol.receipts import open_receipt, sign_receipt
from tests.support.crediting import HOST, RECEIPT, RUN, TRAINER, signed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from protocol.identity import Identity

ADA = Profile(name="Ada", issued_s=1)


class Signs:
    """A host that signs whatever it is asked for, in the name of whoever asks."""

    def __init__(self) -> None:
        self.callers: list[str] = []

    def countersign(self, claim: pb.SignedReceipt, caller: str) -> pb.CountersignResponse:
        self.callers.append(caller)
        if not claim.receipt:
            raise InvalidInputError("receipt.run_id", "is missing")
        return pb.CountersignResponse(host_signature=b"signed")

    def counted(self, caller: str) -> pb.CountedResponse:
        self.callers.append(caller)
        return pb.CountedResponse(forward_pairs=7)


def call_of(caller: Identity | None, left_s: float | None = 5.0) -> Any:
    """A call's context."""
    metadata = CallSigner(caller).metadata(HOST.peer_id, "/any") if caller else ()
    return SimpleNamespace(invocation_metadata=lambda: metadata, time_remaining=lambda: left_s)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReceiptStore]:
    with closing(ReceiptStore(tmp_path, RUN)) as made:
        made.open()
        with made.transaction() as connection:
            made.put(connection, signed(), RECEIPT.end_s)
        yield made


def service(store: ReceiptStore, signs: Signs | None = None, profile: Profile | None = ADA) -> CreditService:
    return CreditService(RUN, store, HOST, profile, signs)


async def test_anybody_gets_receipts_with_the_name_that_the_owner_wants(store: ReceiptStore) -> None:
    for caller in (TRAINER, None):
        page = await service(store)._collect(pb.CollectRequest(run_id=RUN), call_of(caller))
        assert [open_receipt(one) for one in page.receipts] == [RECEIPT]
        assert open_profile(page.profile, HOST.peer_id) == ADA
    page = await service(store, profile=None)._collect(pb.CollectRequest(run_id=RUN), call_of(TRAINER))
    assert not page.HasField("profile")


async def test_a_host_signs_for_the_caller_who_has_signed_the_call(store: ReceiptStore) -> None:
    signs = Signs()
    claim = sign_receipt(TRAINER, RECEIPT)
    answer = await service(store, signs)._countersign(claim, call_of(TRAINER))
    counted = await service(store, signs)._counted(pb.CountedRequest(run_id=RUN), call_of(TRAINER))
    assert (answer.host_signature, counted.forward_pairs, signs.callers) == (b"signed", 7, [TRAINER.peer_id] * 2)
    for unsigned in (call_of(None), call_of(None, None)):
        with pytest.raises(UnauthenticatedError, match="receipts are for callers that sign their calls"):
            await service(store, signs)._countersign(claim, unsigned)


async def test_what_the_host_finds_wrong_is_told_as_it_is(store: ReceiptStore) -> None:
    with pytest.raises(InvalidInputError, match=r"receipt\.run_id: is missing"):
        await service(store, Signs())._countersign(pb.SignedReceipt(), call_of(TRAINER))


async def test_another_run_is_refused(store: ReceiptStore) -> None:
    served = service(store, Signs())
    with pytest.raises(UnknownRunError):
        await served._collect(pb.CollectRequest(run_id="other"), call_of(TRAINER))
    with pytest.raises(UnknownRunError):
        await served._counted(pb.CountedRequest(), call_of(TRAINER))


async def test_a_caller_has_a_quota_of_all_calls_together(store: ReceiptStore) -> None:
    served = service(store, Signs())
    for _ in range(MAX_CALLS // 2):
        await served._counted(pb.CountedRequest(run_id=RUN), call_of(TRAINER))
        await served._collect(pb.CollectRequest(run_id=RUN), call_of(TRAINER))
    with pytest.raises(OverloadedError, match="more than 120 calls"):
        await served._collect(pb.CollectRequest(run_id=RUN), call_of(TRAINER))


async def test_a_call_whose_deadline_has_passed_does_nothing(store: ReceiptStore) -> None:
    signs = Signs()
    with pytest.raises(DeadlineError):
        await service(store, signs)._countersign(sign_receipt(TRAINER, RECEIPT), call_of(TRAINER, 0.0))
    assert signs.callers == []


async def test_a_disk_that_fails_is_for_the_caller_a_node_that_is_away(
    store: ReceiptStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.close()
    served = service(store)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="cannot keep or read receipts now: try again later"):
            await served._collect(pb.CollectRequest(run_id=RUN), call_of(TRAINER))
    assert sum("Receipts cannot be kept or read" in record.message for record in caplog.records) == 1


def test_only_a_host_offers_to_sign(store: ReceiptStore) -> None:
    details: Any = SimpleNamespace(invocation_metadata=())
    for name, on_host, on_trainer in (("Collect", True, True), ("Countersign", True, False), ("Counted", True, False)):
        details.method = f"/kilohive.v1.Credit/{name}"
        assert (service(store, Signs()).handler().service(details) is not None) == on_host
        assert (service(store).handler().service(details) is not None) == on_trainer
