"""Failover and hedges of one pass through a layer, over peers that do as the test says."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import (
    DeadlineError,
    InvalidInputError,
    KilohiveError,
    NotHostedError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)
from node.model.pairs import flat_pairs
from node.trainer.dispatch import delivery
from node.trainer.dispatch.delivery import Delivery, DeliveryLimits
from node.trainer.dispatch.loop_bridge import LoopBridge
from node.trainer.dispatch.peers import Peers
from node.trainer.dispatch.plan import LayerChoice, Part, Planner, SplitLimits, split_by_peer
from protocol.manifest import BlockId
from protocol.security import NotConnectedError
from tests.support.swarm_parts import FakeDirectory, LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMITS = SplitLimits(experts_per_block=4, max_tokens=65_536)
IDS_TK = torch.tensor([[0, 4], [5, 1], [2, -1], [-1, 7]])
BLOCK_OF_FLAT = {0: 0, 1: 1, 2: 1, 3: 0, 4: 0, 7: 1}


@dataclass(frozen=True)
class Asked:
    part: Part

    @property
    def peer_id(self) -> str:
        return self.part.replica.peer_id


@dataclass
class ScriptedWork:
    """Answers with the peer's name. A peer in `gates` answers or fails when its gate does, one in `errors` at once.

    So many first calls to a peer as `losses` says get lost.
    """

    gates: dict[str, Future[None]] = field(default_factory=dict)
    errors: dict[str, KilohiveError] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)
    not_hosted: set[tuple[str, int]] = field(default_factory=set)
    on_hedge: Callable[[], None] = lambda: None
    asked: list[tuple[str, tuple[int, ...], float, bool]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def elsewhere(self, part: Part, before: Asked, error: KilohiveError | None) -> Asked:
        if error is None:
            self.on_hedge()
        return Asked(part)

    def again(self, request: Asked, error: KilohiveError) -> Asked | None:
        return None

    async def send(self, request: Asked, timeout_s: float, *, patient: bool) -> str:
        peer_id, blocks = request.peer_id, request.part.blocks
        self.asked.append((peer_id, blocks, timeout_s, patient))
        if any((peer_id, block) in self.not_hosted for block in blocks):
            raise NotHostedError("expert_P", "is not hosted here")
        if self.losses[peer_id]:
            self.losses[peer_id] -= 1
            raise UnavailableError("lost on the way")
        if peer_id in self.errors:
            raise self.errors[peer_id]
        if peer_id in self.gates:
            try:
                await asyncio.shield(asyncio.wrap_future(self.gates[peer_id]))
            except asyncio.CancelledError:
                self.cancelled.append(peer_id)
                raise
        return peer_id

    def accept(self, request: Asked, response: str, seconds: float) -> str:
        return response


class Swarm:
    """Peers by name and the blocks that they hold; what a pass over them answers."""

    def __init__(self, loop: LoopThread, **blocks: tuple[int, ...]) -> None:
        self.directory, self.work = FakeDirectory(), ScriptedWork()
        for peer_id, held in blocks.items():
            self.directory.add(peer_id, "h:1", [BlockId(0, block) for block in held])
        self.peers = Peers(self.directory, 5.0, random.Random(0))
        choice = LayerChoice(0, IDS_TK, torch.ones(IDS_TK.shape))
        self.planner = Planner(choice, self.peers, LIMITS)
        self.calls = LoopBridge(loop.loop)

    def gate(self, peer_id: str) -> Future[None]:
        return self.work.gates.setdefault(peer_id, Future())

    def run(self, first: str, timeout_s: float = 20.0, hedge_after_s: float | None = None) -> dict[str, list[int]]:
        """Who answered which pairs, when all of them are first sent to `first`."""
        replicas = {b: r for b in (0, 1) for r in self.directory.replicas(BlockId(0, b)) if r.peer_id == first}
        parts, orphans = split_by_peer(IDS_TK, torch.ones(IDS_TK.shape), flat_pairs(IDS_TK), replicas, LIMITS)
        assert not len(orphans)
        limits = DeliveryLimits(deadline=time.monotonic() + timeout_s, hedge_after_s=hedge_after_s)
        answers = Delivery(self.planner, self.work, self.peers, self.calls, limits).run(map(Asked, parts))
        assert self.calls.in_flight == 0
        answered: dict[str, list[int]] = {}
        for request, peer_id in answers:
            assert request.peer_id == peer_id
            answered.setdefault(peer_id, []).extend(request.part.flat.tolist())
        return answered


def flat_of(*blocks: int) -> list[int]:
    return [flat for flat, block in BLOCK_OF_FLAT.items() if block in blocks]


def end(gate: Future[None], error: KilohiveError | None = None) -> None:
    """Open a gate, unless an earlier hedge has."""
    if not gate.done():
        gate.set_exception(error) if error else gate.set_result(None)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def test_pairs_of_a_peer_that_fails_are_split_over_the_others(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), a=(0,), b=(1,))
    swarm.work.errors["first"] = NotConnectedError("gone")
    assert swarm.run("first") == {"a": flat_of(0), "b": flat_of(1)}
    assert swarm.directory.failures == ["first"]


def test_a_peer_that_refuses_its_input_is_not_held_responsible(
    loop: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))
    swarm.work.errors["first"] = InvalidInputError("inputs.tokens_TD", "holds NaN or infinity")
    for _ in range(3):
        assert swarm.run("first") == {"other": flat_of(0, 1)}
        swarm.planner = Planner(swarm.planner.choice, swarm.peers, LIMITS)
    assert swarm.directory.failures == []
    assert swarm.peers.calls_failed == 3
    assert "first at h:1 refuses what it was sent" in caplog.text
    swarm.work.errors["other"] = UnauthenticatedError("signed 40 s ago")
    assert swarm.run("first") == {}
    assert swarm.planner.failed_peers == set()
    assert swarm.planner.refusals == {"inputs.tokens_TD: holds NaN or infinity", "signed 40 s ago"}


def test_a_peer_whose_answer_is_off_is_held_responsible(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))

    def accept(request: Asked, response: str, _seconds: float) -> str:
        if response == "first":
            raise InvalidInputError("combined_TD", "holds NaN or infinity")
        return response

    monkeypatch.setattr(swarm.work, "accept", accept)
    assert swarm.run("first") == {"other": flat_of(0, 1)}
    assert swarm.directory.failures == ["first"]


def test_a_call_that_got_lost_is_repeated_once_at_the_same_peer(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))
    swarm.work.losses["first"] = 1
    assert swarm.run("first") == {"first": flat_of(0, 1)}
    assert swarm.directory.failures == []
    assert swarm.peers.calls_failed == 1


def test_a_call_that_got_lost_twice_fails_over_and_its_peer_is_not_yet_avoided(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))
    swarm.work.losses["first"] = 2
    assert swarm.run("first") == {"other": flat_of(0, 1)}
    assert [peer_id for peer_id, *_ in swarm.work.asked] == ["first", "first", "other"]
    assert swarm.directory.failures == []
    assert swarm.peers.calls_failed == 2


def test_a_late_call_that_gets_lost_leaves_its_pairs_to_its_hedges(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))
    gate = swarm.gate("first")
    swarm.work.on_hedge = lambda: end(gate, UnavailableError("lost on the way"))
    assert swarm.run("first", hedge_after_s=0.01) == {"other": flat_of(0, 1)}
    assert [peer_id for peer_id, *_ in swarm.work.asked] == ["first", "other"]


def test_failover_goes_on_until_no_replica_is_left_and_then_drops_the_pairs(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), a=(0, 1), b=(0,))
    swarm.work.errors = {"first": NotConnectedError("gone"), "a": DeadlineError("late")}
    assert swarm.run("first") == {"b": flat_of(0)}
    assert swarm.planner.failed_peers == {"first", "a"}
    assert len(swarm.work.asked) <= 4


def test_a_peer_that_gave_up_one_block_is_still_asked_for_the_other(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1), b=(1,))
    swarm.work.not_hosted = {("first", 1)}
    assert swarm.run("first") == {"first": flat_of(0), "b": flat_of(1)}
    assert swarm.directory.failures == []


def test_a_call_with_another_replica_behind_it_has_half_of_the_time_and_does_not_wait_for_a_busy_peer(
    loop: LoopThread,
) -> None:
    swarm = Swarm(loop, first=(0, 1), other=(0, 1))
    swarm.work.errors["first"] = OverloadedError("full", retry_after_s=0.1)
    swarm.run("first", timeout_s=20.0)
    (_, _, first_s, first_waits), (_, _, last_s, last_waits) = swarm.work.asked
    assert first_s == pytest.approx(10.0, rel=1e-3)
    assert last_s > first_s
    assert (first_waits, last_waits) == (False, True)


def test_no_call_is_started_when_the_deadline_is_all_but_over(loop: LoopThread) -> None:
    swarm = Swarm(loop, first=(0, 1))
    assert swarm.run("first", timeout_s=delivery.MIN_CALL_S / 2) == {}
    assert swarm.work.asked == []
    assert swarm.directory.failures == []


def test_a_late_call_is_hedged_over_several_peers_that_win_when_all_have_answered(loop: LoopThread) -> None:
    swarm = Swarm(loop, slow=(0, 1), a=(0,), b=(1,))
    swarm.gate("slow")
    assert swarm.run("slow", hedge_after_s=0.0) == {"a": flat_of(0), "b": flat_of(1)}
    assert (swarm.peers.hedges_sent, swarm.peers.hedges_won) == (1, 1)
    assert swarm.directory.failures == []
    loop.call(asyncio.sleep(0))
    assert swarm.work.cancelled == ["slow"]


def test_a_late_call_that_is_complete_before_all_of_its_hedges_wins(loop: LoopThread) -> None:
    swarm = Swarm(loop, slow=(0, 1), a=(0,), b=(1,))
    slow, never = swarm.gate("slow"), swarm.gate("b")
    swarm.work.on_hedge = lambda: end(slow)
    assert swarm.run("slow", hedge_after_s=0.0) == {"slow": flat_of(0, 1)}
    assert (swarm.peers.hedges_sent, swarm.peers.hedges_won) == (1, 0)
    assert not never.done()


def test_a_hedge_that_fails_leaves_the_pairs_to_the_late_call(loop: LoopThread) -> None:
    swarm = Swarm(loop, slow=(0, 1), a=(0,), b=(1,), c=(0, 1))
    slow = swarm.gate("slow")
    swarm.work.errors = {name: NotConnectedError("gone") for name in "abc"}
    swarm.directory.report_failure = lambda peer_id, retry_after_s: end(slow)  # type: ignore[method-assign]
    assert swarm.run("slow", hedge_after_s=0.0) == {"slow": flat_of(0, 1)}
    assert swarm.peers.hedges_won == 0


def test_when_a_late_call_fails_its_hedges_are_the_failover_and_fail_over_themselves(loop: LoopThread) -> None:
    swarm = Swarm(loop, slow=(0, 1), a=(0,), b=(1,))
    slow, b = swarm.gate("slow"), swarm.gate("b")
    swarm.work.on_hedge = lambda: end(slow, NotConnectedError("gone"))

    def failed(peer_id: str, retry_after_s: float) -> None:
        swarm.directory.failures.append(peer_id)
        if peer_id == "slow":
            swarm.directory.add("c", "h:1", [BlockId(0, 1)])
            b.set_exception(DeadlineError("late"))

    swarm.directory.report_failure = failed  # type: ignore[method-assign]
    assert swarm.run("slow", hedge_after_s=0.0) == {"a": flat_of(0), "c": flat_of(1)}
    assert swarm.directory.failures == ["slow", "b"]
    assert [peer_id for peer_id, *_ in swarm.work.asked] == ["slow", "a", "b", "c"]


def test_there_is_no_hedge_when_some_block_has_no_other_replica(loop: LoopThread) -> None:
    swarm = Swarm(loop, slow=(0, 1), a=(0,))
    slow, planned_without = swarm.gate("slow"), list[str]()

    class WatchedPlanner(Planner):
        def plan(self, flat: torch.Tensor, without: str = "") -> tuple[list[Part], torch.Tensor]:
            planned_without.append(without)
            slow.set_result(None)
            return super().plan(flat, without)

    swarm.planner = WatchedPlanner(swarm.planner.choice, swarm.peers, LIMITS)
    assert swarm.run("slow", hedge_after_s=0.0) == {"slow": flat_of(0, 1)}
    assert planned_without == ["slow"]
    assert swarm.peers.hedges_sent == 0


def test_an_event_loop_that_never_answers_is_an_error(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LOOP_GRACE_S", 0.0)
    swarm = Swarm(loop, first=(0, 1))
    swarm.gate("first")  # and the scripted call keeps no deadline
    with pytest.raises(UnavailableError, match="event loop did not answer"):
        swarm.run("first", timeout_s=0.2)
