"""Collecting: peers are asked page by page, and nothing is credited that both sides have not signed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from common.errors import StorageError, UnavailableError
from coordinator.credit import collector as collector_module
from coordinator.credit.collector import Collected, Collector
from protocol import receipts_pb2 as pb
from protocol.profile import Profile, sign_profile
from protocol.receipts import MAX_RECEIPT_AGE_S, sign_receipt
from tests.support.crediting import HOST, NOW_S, RECEIPT, RUN, STRANGER, TRAINER, forged, minutes, receipt, signed
from tests.support.ledgers import STORE, both, credited, ledger_in, member, sums_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coordinator.credit.ledger import Ledger
    from protocol.endpoints import Address


class Peers:
    """The channels to peers, each with a list of receipts and pages of two."""

    def __init__(self) -> None:
        self.receipts: dict[str, list[pb.SignedReceipt]] = {HOST.peer_id: [], TRAINER.peer_id: []}
        self.store = STORE
        self.profile: pb.SignedProfile | None = None
        self.asked: list[tuple[str, int]] = []
        self.dropped: list[str] = []

    async def call(self, address: Address, path: str, raw: bytes, _timeout_s: float) -> bytes:
        assert path == "/kilohive.v1.Credit/Collect"
        request = pb.CollectRequest.FromString(raw)
        assert request.run_id == RUN
        self.asked.append((address.peer_id, request.after))
        return self.page(address.peer_id, request).SerializeToString()

    def page(self, peer_id: str, request: pb.CollectRequest) -> pb.ReceiptPage:
        if peer_id not in self.receipts:
            raise UnavailableError("gone")
        after = request.after if request.store == self.store else 0
        rest = self.receipts[peer_id][after:]
        page = pb.ReceiptPage(store=self.store, receipts=rest[:2], next=after + len(rest[:2]), more=len(rest) > 2)
        if self.profile is not None:
            page.profile.CopyFrom(self.profile)
        return page

    def drop(self, address: Address) -> None:
        self.dropped.append(address.peer_id)


class Node:
    """A collector that knows HOST and TRAINER."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.peers, self.members = ledger, Peers(), both()
        channels: Any = self.peers
        self.collector = Collector(RUN, ledger, channels, lambda: float(NOW_S))

    async def collect(self) -> Collected:
        return await self.collector.collect(self.members)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ledger_in(tmp_path) as ledger:
        yield Node(ledger)


def of_host(node: Node, *messages: pb.SignedReceipt) -> None:
    node.peers.receipts[HOST.peer_id] = list(messages)


async def test_receipts_of_both_sides_are_read_to_the_end_and_count_once(node: Node) -> None:
    messages = [signed(one) for one in minutes(5)]
    node.peers.receipts = {HOST.peer_id: messages, TRAINER.peer_id: messages[::-1]}
    assert await node.collect() == Collected(asked=2, answered=2, new=5, refused=0)
    assert credited(node.ledger) == (10_000, 5_000, 5)
    assert sorted(node.peers.dropped) == sorted([HOST.peer_id, TRAINER.peer_id])


async def test_the_next_collection_goes_on_where_the_last_one_ended(node: Node) -> None:
    of_host(node, *(signed(one) for one in minutes(3)))
    await node.collect()
    of_host(node, *(signed(one) for one in minutes(4)))
    node.peers.asked.clear()
    assert (await node.collect()).new == 1
    assert [after for peer_id, after in node.peers.asked if peer_id == HOST.peer_id] == [3]


async def test_a_peer_that_has_begun_its_store_anew_is_read_from_the_first(node: Node) -> None:
    of_host(node, *(signed(one) for one in minutes(3)))
    await node.collect()
    of_host(node, *(signed(one) for one in minutes(4)[2:]))
    node.peers.store = bytes(16)
    assert (await node.collect()).new == 1
    assert credited(node.ledger) == (8000, 4000, 4)


@pytest.mark.parametrize(
    "message",
    [
        sign_receipt(TRAINER, RECEIPT),
        forged(by_trainer=STRANGER),
        forged(by_host=STRANGER),
        forged(by_host=TRAINER, by_trainer=HOST),
        forged(end_s=RECEIPT.start_s + 600),
        forged(forward_pairs=1 << 40),
        signed(receipt(run_id="demo-0123456789ac")),
        signed(receipt(start_s=NOW_S + 30, end_s=NOW_S + 90)),
        signed(receipt(start_s=NOW_S - MAX_RECEIPT_AGE_S - 60, end_s=NOW_S - MAX_RECEIPT_AGE_S)),
        pb.SignedReceipt(receipt=b"\xff", trainer_signature=bytes(64), host_signature=bytes(64)),
    ],
    ids=[
        "one-sided",
        "forged for the trainer",
        "forged for the host",
        "roles swapped",
        "ten minutes",
        "inflated",
        "wrong run",
        "from the future",
        "too old",
        "no receipt",
    ],
)
async def test_what_does_not_hold_earns_nothing_and_what_comes_beside_it_does(
    node: Node, message: pb.SignedReceipt
) -> None:
    good, later = minutes(2)
    of_host(node, signed(good), message, signed(later))
    assert await node.collect() == Collected(asked=2, answered=2, new=2, refused=1)
    assert credited(node.ledger) == (4000, 2000, 2)


async def test_nobody_hands_on_the_receipts_of_others(node: Node) -> None:
    node.members.append(member(STRANGER, "host"))
    node.peers.receipts[STRANGER.peer_id] = [signed()]
    assert await node.collect() == Collected(asked=3, answered=3, new=0, refused=1)


async def test_receipts_with_somebody_who_is_not_in_the_run_earn_nothing(node: Node) -> None:
    of_host(node, signed(receipt(trainer=STRANGER.public_key), trainer=STRANGER))
    assert (await node.collect()).new == 1
    assert credited(node.ledger) == (0, 0, 0)
    assert sums_of(node.ledger).unseen_receipts == 1


async def test_who_does_not_answer_or_cannot_be_called_costs_nobody_else_anything(node: Node) -> None:
    node.members += [member(STRANGER, "host")]
    node.members[1] = node.members[1]._replace(address=node.members[1].address._replace(endpoint=""))
    of_host(node, signed())
    assert await node.collect() == Collected(asked=2, answered=1, new=1, refused=0)


async def test_a_peer_whose_receipts_do_not_hold_is_asked_no_more_this_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_module, "MAX_REFUSED", 3)
    of_host(node, *[sign_receipt(TRAINER, one) for one in minutes(20)])
    assert (await node.collect()).refused == 4
    assert (await node.collect()).refused == 4


async def test_a_peer_is_asked_for_so_many_pages_and_the_rest_next_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_module, "MAX_PAGES", 2)
    of_host(node, *[signed(one) for one in minutes(9)])
    assert [(await node.collect()).new for _ in range(3)] == [4, 4, 1]


@pytest.mark.parametrize(
    "page",
    [
        pb.ReceiptPage(store=b"short"),
        pb.ReceiptPage(store=STORE, next=0, more=True),
        pb.ReceiptPage(store=STORE, receipts=[signed()], next=0),
        pb.ReceiptPage(store=STORE, next=1 << 63),
        pb.ReceiptPage(store=STORE, receipts=[pb.SignedReceipt()] * 501, next=501),
        pb.ReceiptPage(store=STORE, receipts=[pb.SignedReceipt(receipt=bytes(300_000))], next=1),
    ],
    ids=["no store", "the same again", "leads nowhere", "beyond all places", "too many", "too long"],
)
async def test_a_page_that_cannot_be_ends_the_visit(
    node: Node, page: pb.ReceiptPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.peers, "page", lambda peer_id, request: page)
    assert await node.collect() == Collected(asked=2, answered=0, new=0, refused=0)
    assert len(node.peers.asked) == 2


async def test_a_name_is_taken_over_and_given_up_and_a_bad_one_is_ignored(node: Node) -> None:
    of_host(node, signed())
    node.peers.profile = sign_profile(HOST, Profile(name="Ada", team="Engines"))
    await node.collect()
    sums = sums_of(node.ledger)
    assert (sums.hosts[0].name, sums.hosts[0].team, sums.trainers[0].name) == ("Ada", "Engines", "")
    node.peers.profile.signature = bytes(64)
    await node.collect()
    assert sums_of(node.ledger).hosts[0].name == ""


async def test_a_disk_that_fails_is_told_once_all_visits_have_ended(node: Node) -> None:
    of_host(node, signed())
    node.ledger.close()
    with pytest.raises(StorageError, match="is not open"):
        await node.collect()
