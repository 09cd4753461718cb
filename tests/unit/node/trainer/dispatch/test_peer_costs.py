"""Which replica dispatch calls: power of two choices on what calls have cost, and whom it leaves alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from common.errors import NotHostedError, OverloadedError, UnavailableError
from dht.directory import MAX_AVOID_S
from node.trainer.dispatch import peer_costs as replica_choice
from node.trainer.dispatch.peer_costs import MIN_SAMPLES, WINDOW, CostConfig, LatencyWindow, PeerCosts, choose
from node.trainer.dispatch.peers import Peers
from protocol.manifest import BlockId
from protocol.security import NotConnectedError
from tests.support.swarm_parts import FakeDirectory, make_replica

if TYPE_CHECKING:
    from dht.view import Replica

BLOCK = BlockId(0, 0)


def replica(peer_id: str, queue_tokens: int = 0) -> Replica:
    return replace(make_replica(BLOCK, peer_id, "h:1"), queue_tokens=queue_tokens)


def calls_per_peer(seconds_by_peer: dict[str, float], n_calls: int, seed: int = 0) -> Counter[str]:
    """How often each peer is chosen when calls of 100 tokens follow each other and take these seconds."""
    costs, rng, now_s, calls = PeerCosts(), random.Random(seed), 0.0, Counter[str]()
    replicas = [replica(peer_id) for peer_id in seconds_by_peer]
    for _ in range(n_calls):
        at_s = now_s
        peer_id = choose(replicas, lambda r, at_s=at_s: costs.cost(r, at_s), rng).peer_id  # type: ignore[misc]
        calls[peer_id] += 1
        now_s += seconds_by_peer[peer_id]
        costs.answered(peer_id, seconds_by_peer[peer_id], 100, 0, now_s)
    return calls


@pytest.mark.parametrize("seed", range(5))
def test_two_equal_peers_share_about_evenly(seed: int) -> None:
    calls = calls_per_peer({"a": 0.1, "b": 0.1}, 400, seed)
    assert 160 <= calls["a"] <= 240


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_peer_gets_less_but_is_tried_again(seed: int) -> None:
    calls = calls_per_peer({"slow": 0.4, "fast": 0.1}, 1000, seed)
    assert 5 <= calls["slow"] <= 100


def test_a_peer_that_has_become_fast_is_believed_after_its_next_answers() -> None:
    costs = PeerCosts(CostConfig(half_life_s=10.0))
    costs.answered("a", 10.0, 100, 0, now_s=0.0)
    for now_s in (60.0, 61.0, 62.0):
        costs.answered("a", 0.1, 100, 0, now_s)
    costs.answered("b", 0.1, 100, 0, now_s=62.0)
    assert costs.cost(replica("a"), 62.0) < 2 * costs.cost(replica("b"), 62.0)


def test_of_two_drawn_the_cheaper_is_taken_so_the_dearest_of_three_never_is() -> None:
    prices = {"cheap": 1.0, "middle": 2.0, "dear": 3.0}
    replicas, rng = [replica(peer_id) for peer_id in prices], random.Random(1)
    chosen = Counter(choose(replicas, lambda r: prices[r.peer_id], rng).peer_id for _ in range(3000))
    assert chosen["dear"] == 0
    assert chosen["cheap"] == pytest.approx(2000, abs=120)  # it is in two of the three pairs


def test_a_lone_replica_is_taken_whatever_it_costs() -> None:
    assert choose([replica("a")], lambda _: float("inf"), random.Random(0)).peer_id == "a"


def test_the_size_of_its_requests_says_little_about_a_peer() -> None:
    # Both peers take 64 tokens' time for the round trip and then a millisecond per token.
    costs = PeerCosts()
    costs.answered("small requests", (64 + 10) * 1e-3, 10, 0, now_s=0.0)
    costs.answered("large requests", (64 + 5000) * 1e-3, 5000, 0, now_s=0.0)
    small, large = (costs.cost(replica(name), 0.0) for name in ("small requests", "large requests"))
    assert small == pytest.approx(large)


def test_a_queue_that_an_answer_reported_counts_until_the_directory_knows_better() -> None:
    costs = PeerCosts(CostConfig(load_scale_tokens=1000, queue_fresh_s=5.0, half_life_s=1e9))
    costs.answered("a", 1.0, 100, 3000, now_s=0.0)
    idle = costs.cost(replica("a"), 6.0)
    assert costs.cost(replica("a"), 4.0) == pytest.approx(4 * idle)
    assert costs.cost(replica("a", queue_tokens=1000), 6.0) == pytest.approx(2 * idle)


def test_tokens_in_flight_and_planned_count_like_a_queue() -> None:
    costs = PeerCosts(CostConfig(load_scale_tokens=1000))
    costs.answered("a", 1.0, 100, 0, now_s=0.0)
    idle = costs.cost(replica("a"), 0.0)
    costs.started("a", 1500)
    assert costs.cost(replica("a"), 0.0, planned_tokens=500) == pytest.approx(3 * idle)
    costs.ended("a", 1500)
    assert costs.cost(replica("a"), 0.0) == idle


def test_an_unknown_peer_is_tried_soon_but_does_not_draw_everything_before_it_has_answered() -> None:
    costs = PeerCosts(CostConfig(load_scale_tokens=1000, optimism=0.5))
    costs.answered("known", 1.0, 100, 0, now_s=0.0)
    known = costs.cost(replica("known"), 0.0)
    assert costs.cost(replica("new"), 0.0) < known
    costs.started("new", 2000)
    assert costs.cost(replica("new"), 0.0) > known


def test_among_unknown_peers_the_queue_in_the_directory_decides() -> None:
    costs = PeerCosts()
    assert costs.cost(replica("idle"), 0.0) < costs.cost(replica("busy", queue_tokens=5000), 0.0)


def test_a_call_that_was_given_up_only_ever_makes_a_peer_dearer() -> None:
    costs = PeerCosts()
    costs.answered("a", 1.0, 100, 0, now_s=0.0)
    before = costs.cost(replica("a"), 0.0)
    costs.outlasted("a", 0.5, 100, now_s=0.0)
    assert costs.cost(replica("a"), 0.0) == before
    costs.outlasted("a", 2.0, 100, now_s=0.0)
    assert costs.cost(replica("a"), 0.0) > before


def test_the_peer_heard_of_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_choice, "MAX_KNOWN_PEERS", 2)
    costs = PeerCosts()
    for peer_id in ("a", "b", "a", "c"):
        costs.answered(peer_id, 1.0, 100, 0, now_s=0.0)
    known = costs.cost(replica("a"), 0.0)
    assert costs.cost(replica("c"), 0.0) == pytest.approx(known)
    assert costs.cost(replica("b"), 0.0) < 0.6 * known


def test_a_call_is_late_after_the_95th_percentile_of_enough_recent_ones() -> None:
    window = LatencyWindow()
    for hundredths in range(1, MIN_SAMPLES):
        window.add(hundredths / 100)
    assert window.late_after_s() is None
    window.add(0.2)
    assert window.late_after_s() == 0.19
    for _ in range(WINDOW):
        window.add(1.0)
    assert window.late_after_s() == 1.0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def swarm_of(*peer_ids: str) -> tuple[FakeDirectory, Clock, Peers]:
    directory, clock = FakeDirectory(), Clock()
    for peer_id in peer_ids:
        directory.add(peer_id, "h:1", [BLOCK, BlockId(0, 1)])
    return directory, clock, Peers(directory, 5.0, random.Random(0), clock)


def test_a_peer_that_gave_up_a_block_is_left_alone_for_that_block_only_and_then_asked_again() -> None:
    directory, clock, peers = swarm_of("a", "b")
    peers.failed(directory.replicas(BLOCK)[0], [BLOCK], NotHostedError("expert_P", "is not hosted here"))
    assert [r.peer_id for r in peers.replicas(BLOCK)] == ["b"]
    assert [r.peer_id for r in peers.replicas(BlockId(0, 1))] == ["a", "b"]
    assert directory.failures == []
    clock.now_s += 5.0
    assert [r.peer_id for r in peers.replicas(BLOCK)] == ["a", "b"]


def test_a_peer_that_holds_some_of_several_blocks_is_left_alone_for_none_of_them() -> None:
    directory, _, peers = swarm_of("a")
    blocks = [BLOCK, BlockId(0, 1)]
    peers.failed(directory.replicas(BLOCK)[0], blocks, NotHostedError("expert_P", "is not hosted here"))
    assert all(peers.replicas(block) for block in blocks)


def test_a_peer_that_fails_is_avoided_longer_each_time_until_it_answers() -> None:
    directory, clock, peers = swarm_of("a")
    first = directory.replicas(BLOCK)[0]
    for _ in range(2):
        peers.failed(first, [BLOCK], NotConnectedError("gone"))
        clock.now_s += 10.0
    peers.failed(first, [BLOCK], OverloadedError("full", retry_after_s=0.3))
    peers.answered("a")
    peers.failed(first, [BLOCK], NotConnectedError("gone"))
    assert directory.retry_after_s == [5.0, 10.0, 0.3, 5.0]
    assert (peers.calls_ok, peers.calls_failed) == (1, 4)


def test_calls_that_were_on_their_way_when_a_peer_died_do_not_have_it_avoided_longer() -> None:
    directory, clock, peers = swarm_of("a")
    first = directory.replicas(BLOCK)[0]
    for _ in range(4):
        peers.failed(first, [BLOCK], NotConnectedError("gone"))
    assert directory.retry_after_s == [5.0]
    clock.now_s += 5.0
    peers.failed(first, [BLOCK], NotConnectedError("gone"))
    assert directory.retry_after_s == [5.0, 10.0], "a call that was made after it"
    assert peers.calls_failed == 5


def test_a_peer_that_never_answers_is_avoided_anew_whenever_it_is_tried_again() -> None:
    directory, clock, peers = swarm_of("a")
    first = directory.replicas(BLOCK)[0]
    for _ in range(8):
        peers.failed(first, [BLOCK], NotConnectedError("gone"))
        clock.now_s += MAX_AVOID_S
    assert directory.retry_after_s == [5.0 * 2**n for n in (0, 1, 2, 3, 4, 5, 6, 6)]


def test_a_peer_is_avoided_from_the_third_call_in_a_row_on_that_got_lost() -> None:
    directory, clock, peers = swarm_of("a")
    first, lost = directory.replicas(BLOCK)[0], UnavailableError("lost on the way")
    for _ in range(2):
        peers.failed(first, [BLOCK], lost)
        peers.failed(first, [BLOCK], lost)
        peers.answered("a")
    assert directory.retry_after_s == []
    for _ in range(4):
        peers.failed(first, [BLOCK], lost)
    assert directory.retry_after_s == [5.0]
    clock.now_s += 5.0
    peers.failed(first, [BLOCK], lost)
    assert directory.retry_after_s == [5.0, 10.0]


def test_a_peer_that_a_hedge_outpaced_is_called_less_and_its_wait_counts_as_a_latency() -> None:
    directory, _, peers = swarm_of("late", "quick")
    for _ in range(MIN_SAMPLES - 1):
        peers.learn("late", 0.1, 100, 0)
        peers.learn("quick", 0.2, 100, 0)
    replicas = directory.replicas(BLOCK)
    assert peers.choose(replicas, Counter()).peer_id == "late"
    for _ in range(3):
        peers.outpaced("late", 2.0, 100)
    assert peers.choose(replicas, Counter()).peer_id == "quick"
    assert peers.late_after_s() == 2.0
    assert peers.hedges_won == 3
