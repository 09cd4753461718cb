"""Getting hosts to sign: who is asked when, and what becomes of a claim after each kind of answer."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from common.errors import (
    DeadlineError,
    InvalidInputError,
    KilohiveError,
    LimitExceededError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownRunError,
)
from node.credit.answered import AnsweredPairs, PairCounts
from node.credit.store import ReceiptStore
from node.trainer.credit.claims import SCHEMA, Claims
from node.trainer.credit.sender import COUNTED, COUNTERSIGN, ClaimSender
from protocol import receipts_pb2 as pb
from protocol.endpoints import Address
from protocol.receipts import countersign, open_claim, open_receipt
from tests.support.crediting import HOST, NOW_S, RUN, STRANGER, TRAINER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT = Address(HOST.peer_id, "192.0.2.1:4000")
TOO_MUCH = LimitExceededError("receipt.forward_pairs", 20, 15)


class Hosts:
    """The channels to hosts: HOST signs what it is sent, unless `errors` has something else for the next call."""

    def __init__(self) -> None:
        self.errors: list[KilohiveError | None] = []
        self.counted = pb.CountedResponse(forward_pairs=15, backward_pairs=10)
        self.answer: bytes | None = None
        self.calls: list[tuple[Address, str]] = []

    async def call(self, address: Address, path: str, raw: bytes, _timeout_s: float) -> bytes:
        self.calls.append((address, path))
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        if path == COUNTED:
            assert pb.CountedRequest.FromString(raw).run_id == RUN
            return self.counted.SerializeToString()
        claim = pb.SignedReceipt.FromString(raw)
        open_claim(claim)
        if self.answer is not None:
            return self.answer
        return pb.CountersignResponse(host_signature=countersign(HOST, claim)).SerializeToString()

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.calls]


class Node:
    """A trainer that has claimed three minutes of HOST."""

    def __init__(self, folder: Path) -> None:
        self.now_s, self.monotonic_s = float(NOW_S), 100.0
        self.answered, self.hosts = AnsweredPairs(), Hosts()
        self.addresses = {HOST.peer_id: AT}
        self.store = ReceiptStore(folder, RUN, SCHEMA)
        self.claims = Claims(TRAINER, RUN, self.store, self.answered.taker(), lambda: self.now_s)
        channels: Any = self.hosts
        self.sender = ClaimSender(RUN, self.claims, channels, lambda: self.addresses, lambda: self.monotonic_s)
        self.store.open()
        for _ in range(3):
            self.claim()

    def claim(self) -> None:
        self.answered.add(HOST.peer_id, PairCounts(20, 10))
        self.now_s += 60
        self.claims.make()

    @property
    def n_waiting(self) -> int:
        return sum(map(len, self.claims.waiting().values()))

    @property
    def signed(self) -> list[tuple[int, int]]:
        receipts = map(open_receipt, self.store.page(pb.CollectRequest()).receipts)
        return [(receipt.forward_pairs, receipt.backward_pairs) for receipt in receipts]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    with closing(made.store):
        yield made


async def test_claims_are_signed_oldest_first(node: Node) -> None:
    await node.sender.send()
    assert node.hosts.calls == [(AT, COUNTERSIGN)] * 3
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 3)


async def test_a_host_that_is_not_there_is_not_called_and_loses_nothing(node: Node) -> None:
    node.addresses = {STRANGER.peer_id: AT}
    await node.sender.send()
    assert (node.hosts.calls, node.n_waiting) == ([], 3)


@pytest.mark.parametrize(
    "error",
    [UnavailableError("gone"), DeadlineError("late"), OverloadedError("busy"), UnauthenticatedError("wrong clock")],
    ids=lambda error: type(error).__name__,
)
async def test_what_may_pass_is_tried_again_less_and_less_often(node: Node, error: KilohiveError) -> None:
    node.hosts.errors = [error, error]
    tries_at = []
    for _ in range(6):
        before = len(node.hosts.calls)
        await node.sender.send()
        tries_at += [node.monotonic_s] * (len(node.hosts.calls) > before)
        node.monotonic_s += 60
    assert tries_at == [100, 160, 280]
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 3)


async def test_a_failure_in_the_middle_keeps_what_was_signed_and_the_order(node: Node) -> None:
    node.hosts.errors = [None, UnavailableError("gone")]
    await node.sender.send()
    assert (node.n_waiting, len(node.signed), len(node.hosts.calls)) == (2, 1, 2)


async def test_a_claim_above_what_the_host_counted_is_made_again_for_less(node: Node) -> None:
    node.hosts.errors = [TOO_MUCH]
    await node.sender.send()
    assert node.hosts.paths == [COUNTERSIGN, COUNTED, *[COUNTERSIGN] * 3]
    assert (node.n_waiting, node.signed) == (0, [(15, 10), (20, 10), (20, 10)])


async def test_a_claim_that_is_refused_once_more_is_given_up(node: Node) -> None:
    node.hosts.errors = [TOO_MUCH, None, TOO_MUCH]
    await node.sender.send()
    assert node.hosts.paths == [COUNTERSIGN, COUNTED, *[COUNTERSIGN] * 3]
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 2)


async def test_a_host_that_counted_nothing_costs_that_claim_alone(node: Node) -> None:
    node.hosts.errors, node.hosts.counted = [TOO_MUCH], pb.CountedResponse()
    await node.sender.send()
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 2)


async def test_a_host_that_fails_when_asked_what_it_counted_is_asked_again_later(node: Node) -> None:
    node.hosts.errors = [TOO_MUCH, UnavailableError("gone")]
    await node.sender.send()
    assert (node.n_waiting, node.signed) == (3, [])
    node.monotonic_s += 60
    await node.sender.send()
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 3)


@pytest.mark.parametrize(
    "error", [InvalidInputError("receipt.start_s", "was signed for"), UnknownRunError("run_id", "is another")]
)
async def test_what_will_never_be_signed_is_given_up(node: Node, error: KilohiveError) -> None:
    node.hosts.errors = [error]
    await node.sender.send()
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 2)


@pytest.mark.parametrize(
    "answer",
    [b"\xff", b"", bytes(1025), pb.CountersignResponse(host_signature=bytes(64)).SerializeToString()],
    ids=["no message", "nothing", "too long", "no signature"],
)
async def test_an_answer_that_is_no_signature_earns_nothing_and_is_asked_for_again(node: Node, answer: bytes) -> None:
    node.hosts.answer = answer
    await node.sender.send()
    assert (node.n_waiting, node.signed, len(node.hosts.calls)) == (3, [], 1)
    node.hosts.answer = None
    node.monotonic_s += 60
    await node.sender.send()
    assert (node.n_waiting, node.signed) == (0, [(20, 10)] * 3)
