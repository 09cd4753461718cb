"""Offers that wait: one of each peer, eight in all, none of those who have left."""

from __future__ import annotations

import pytest
import torch

from common.errors import OverloadedError, UnknownRequestError
from node.trainer.evaluator.offers import FORGET_S, MAX_KNOWN, MAX_WAITING, Offer, OfferQueue
from node.trainer.evaluator.sequential_test import Decision
from protocol import contribution_pb2 as pb
from protocol.verdict import Offered

WEIGHTS = {"w_in": torch.ones(2, 2)}


def offered(number: int = 0) -> Offered:
    return Offered(run_id="run", layer=0, expert=3, sha256=number.to_bytes(32, "big"))


class Line:
    """A queue and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.queue = OfferQueue(lambda: self.now_s)

    def add(self, caller: str, number: int = 0) -> Offer:
        return self.queue.add(caller, offered(number), WEIGHTS)


@pytest.fixture
def line() -> Line:
    return Line()


def test_offers_are_tried_in_the_order_in_which_they_came(line: Line) -> None:
    first, second = line.add("a"), line.add("b")
    assert [line.queue.status(offer).ahead for offer in (first, second)] == [0, 1]
    assert line.queue.next() is first
    first.state = pb.EVALUATING
    assert line.queue.next() is second
    first.settle(pb.REFUSED, "no gain")
    assert line.queue.status(second).ahead == 0


def test_one_offer_waits_for_each_peer_also_while_it_is_evaluated(line: Line) -> None:
    first = line.add("a")
    for state in (pb.WAITING, pb.EVALUATING):
        first.state = state
        with pytest.raises(OverloadedError, match="another offer of yours"):
            line.add("a", 1)
    first.settle(pb.REFUSED)
    line.add("a", 1)


def test_eight_wait_and_a_ninth_is_told_to_come_again(line: Line) -> None:
    for number in range(MAX_WAITING):
        line.add(f"peer-{number}")
    with pytest.raises(OverloadedError, match="8 offers wait here, the limit is 8") as refused:
        line.add("late")
    assert refused.value.retry_after_s > 0


def test_who_does_not_ask_for_a_minute_has_left_and_makes_room(line: Line) -> None:
    gone = [line.add(f"peer-{number}") for number in range(MAX_WAITING)]
    line.now_s += FORGET_S / 2
    line.queue.ask("peer-3", offered())
    line.now_s += FORGET_S / 2 + 1
    line.queue.check_capacity("late")
    assert line.queue.next() is gone[3]
    with pytest.raises(UnknownRequestError, match="offer it again"):
        line.queue.ask("peer-0", offered())


def test_an_offer_is_asked_about_by_its_own_peer_alone(line: Line) -> None:
    mine = line.add("a")
    assert line.queue.ask("a", offered()) is mine
    for caller, file in (("b", offered()), ("a", offered(1))):
        with pytest.raises(UnknownRequestError):
            line.queue.ask(caller, file)


def test_the_same_file_of_the_same_peer_is_the_same_offer_unless_it_could_not_be_tested(line: Line) -> None:
    offer = line.add("a")
    assert line.queue.known("a", offered()) is offer
    assert line.queue.known("b", offered()) is None
    offer.settle(pb.REFUSED, "no gain")
    assert line.queue.known("a", offered()) is offer
    offer.settle(pb.NOT_TESTED, "no host answered")
    assert line.queue.known("a", offered()) is None
    assert line.add("a") is line.queue.next()


def test_what_is_settled_keeps_no_weights_and_is_forgotten_in_the_end(line: Line) -> None:
    first = line.add("peer-0")
    first.settle(pb.REFUSED, "no gain")
    assert first.weights == {}
    for number in range(1, MAX_KNOWN + 1):
        line.add(f"peer-{number}").settle(pb.REFUSED)
    with pytest.raises(UnknownRequestError):
        line.queue.ask("peer-0", offered())
    assert line.queue.ask("peer-1", offered()).state == pb.REFUSED


def test_its_peer_is_told_how_far_it_is(line: Line) -> None:
    offer = line.add("a")
    offer.state, offer.of_windows = pb.EVALUATING, 200
    offer.decision = Decision(verdict="undecided", why="", low=-1e-3, high=2e-3, n_windows=80)
    status = line.queue.status(offer)
    assert (status.state, status.n_windows, status.of_windows) == (pb.EVALUATING, 80, 200)
    assert (status.low, status.high) == (-1e-3, 2e-3)
    assert not status.HasField("verdict")
