"""Whom averaging dials next: staler and nearer partners sooner, everyone some time, itself never."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.view import Replica
from node.averaging.exchange import BlockResult
from node.averaging.partners import (
    FIRST_AVOID_S,
    FIRST_BUSY_S,
    FRESH_S,
    LASTING_STEPS,
    LONGEST_REST_S,
    MAX_AVOID_S,
    MAX_BUSY_DOUBLINGS,
    MAX_PAIRS,
    MAX_PARTNERS,
    MOST_GROWTH,
    QUIET_S,
    SETTLED,
    WORTH_IT,
    Candidate,
    History,
    candidates,
    choose_partner,
    weight,
)
from node.averaging.replica_set import ReplicaSet
from protocol.manifest import TRUNK, BlockId

REPLICAS = ReplicaSet()
A, B, C = BlockId(0, 0), BlockId(0, 1), BlockId(1, 0)
OWN = "own"
VERSIONS = {A: 10, B: 20, C: 30}

seconds = st.floats(0, 1e9)
some_candidate = st.builds(
    Candidate,
    peer_id=st.text(max_size=5),
    endpoint=st.just("127.0.0.1:4000"),
    blocks=st.just((A,)),
    seconds_since=seconds,
    version_gap=st.integers(0, 1 << 64),
    latency_s=seconds,
)


def replica(peer_id: str, block: BlockId = A, **changes: Any) -> Replica:
    known = Replica(
        block=block,
        peer_id=peer_id,
        endpoint=f"{peer_id}:4000",
        version=VERSIONS.get(block, 0),
        queue_tokens=0,
        tokens_per_s=0.0,
        tokens_total=0,
        n_experts=4,
        expiration_s=100.0,
    )
    return replace(known, **changes)


def found(history: History, now_s: float, *replicas: Replica) -> tuple[Candidate, ...]:
    return candidates(VERSIONS, lambda block: [r for r in replicas if r.block == block], OWN, history, now_s)


def test_a_peer_is_one_candidate_for_all_blocks_that_it_shares_and_this_node_is_none() -> None:
    history = History(0.0)
    (p, q) = found(history, 5.0, replica("q", C), replica("p"), replica(OWN), replica("p", C), replica("x", TRUNK))
    assert (p.peer_id, p.endpoint, p.blocks) == ("p", "p:4000", (A, C))
    assert (q.peer_id, q.blocks) == ("q", (C,))
    assert p.seconds_since == q.seconds_since == 5.0


def test_only_replicas_that_serve_are_partners() -> None:
    assert found(History(0.0), 1.0, replica("p", state="joining"), replica("q", state="stored")) == ()


def test_blocks_come_stalest_first_and_the_stalest_counts() -> None:
    history = History(0.0)
    history.met(A, "p", 30.0)
    history.met(B, "p", 10.0)
    history.met(B, "q", 39.0)
    history.met(C, "p", 20.0)
    (p,) = found(history, 40.0, *(replica("p", block) for block in VERSIONS))
    assert p.blocks == (B, C, A)
    assert p.seconds_since == 30.0


def test_a_peer_that_moved_is_dialled_at_its_newest_address() -> None:
    moved = replica("p", B, endpoint="new:4000", expiration_s=101.0)
    (p,) = found(History(0.0), 0.0, replica("p"), moved, replica("p", C))
    assert (p.endpoint, p.blocks) == ("new:4000", (A, B, C))


def test_the_largest_gap_in_versions_counts_ahead_or_behind() -> None:
    (p,) = found(History(0.0), 0.0, replica("p", version=3), replica("p", B, version=25), replica("p", C))
    assert p.version_gap == 7


@settings(deadline=None)
@given(some_candidate, seconds, st.integers(0, 1 << 64), seconds)
def test_staler_and_nearer_never_weigh_less_and_nobody_weighs_nothing(
    candidate: Candidate, more_s: float, more_steps: int, farther_s: float
) -> None:
    known = weight(candidate)
    assert known > 0
    assert weight(replace(candidate, seconds_since=candidate.seconds_since + more_s)) >= known
    assert weight(replace(candidate, version_gap=candidate.version_gap + more_steps)) >= known
    assert weight(replace(candidate, latency_s=candidate.latency_s + farther_s)) <= known


@settings(deadline=None)
@given(st.lists(some_candidate, min_size=1, max_size=5), st.integers())
def test_the_choice_is_one_of_the_candidates(some: list[Candidate], seed: int) -> None:
    assert choose_partner(some, random.Random(seed)) in some


def draws(*some: Candidate) -> Counter[str]:
    rng = random.Random(1)
    return Counter(choose_partner(some, rng).peer_id for _ in range(2000))


def test_the_staler_the_further_apart_and_the_nearer_is_drawn_more_often() -> None:
    plain = Candidate(peer_id="plain", endpoint="", blocks=(A,), seconds_since=10.0, version_gap=5, latency_s=0.5)
    for other in (
        replace(plain, peer_id="other", seconds_since=40.0),
        replace(plain, peer_id="other", version_gap=500),
        replace(plain, peer_id="other", latency_s=0.1),
    ):
        drawn = draws(plain, other)
        assert drawn["other"] > 1.5 * drawn["plain"] > 0


@settings(deadline=None)
@given(st.integers())
def test_nobody_starves_beside_faster_partners_and_forged_versions(seed: int) -> None:
    rng, history, met = random.Random(seed), History(0.0), Counter[str]()
    latencies_s = {"near": 0.0, "liar": 0.01, "far": 1.0, "farther": 3.0}
    replicas = [replica(peer_id) for peer_id in latencies_s]
    replicas[1] = replica("liar", version=(1 << 63) - 1)
    now_s = 0.0
    for _ in range(400):
        now_s += 2.0
        chosen = choose_partner(found(history, now_s, *replicas), rng).peer_id
        met[chosen] += 1
        history.met(A, chosen, now_s)
        history.answered(chosen, latencies_s[chosen])
    assert met.keys() == latencies_s.keys()
    assert met["near"] > met["farther"]


def test_a_failing_partner_is_avoided_for_twice_as_long_each_time_and_forgiven_when_it_answers() -> None:
    history, now_s = History(0.0), 0.0
    for n in range(8):
        history.failed("p", now_s)
        avoided_s = min(FIRST_AVOID_S * 2**n, MAX_AVOID_S)
        assert found(history, now_s + avoided_s - 0.01, replica("p")) == ()
        now_s += avoided_s
        assert found(history, now_s, replica("p"))
    history.answered("p", 0.1)
    history.failed("p", now_s)
    assert not history.avoids("p", now_s + FIRST_AVOID_S)


def test_a_busy_partner_is_avoided_as_long_as_it_asks_and_that_is_no_failure() -> None:
    history = History(0.0)
    history.busy("p", 0.0, 1.5)
    assert history.avoids("p", 1.4)
    assert not history.avoids("p", 1.5)
    history.busy("p", 0.0, 1e9)
    assert not history.avoids("p", MAX_AVOID_S)
    history.failed("p", 0.0)
    assert not history.avoids("p", FIRST_AVOID_S)


def test_a_partner_that_is_always_busy_is_asked_less_and_less_often_down_to_a_limit() -> None:
    history, now_s = History(0.0), 0.0
    for n in range(9):
        history.busy("p", now_s, 0.0)
        wait_s = FIRST_BUSY_S * 2 ** min(n, MAX_BUSY_DOUBLINGS)
        assert history.busy_for_s(now_s) == pytest.approx(wait_s)
        now_s += wait_s + 1e-6
        assert not history.avoids("p", now_s)
    history.answered("p", 0.1)
    history.busy("p", now_s, 0.0)
    assert history.busy_for_s(now_s) == pytest.approx(FIRST_BUSY_S)


def test_a_partner_that_failed_is_not_merely_busy() -> None:
    history = History(0.0)
    history.busy("p", 0.0, 1.0)
    assert history.is_busy("p", 0.5)
    assert not history.is_busy("p", 1.0)
    history.failed("p", 1.0)
    assert not history.is_busy("p", 1.5)
    assert history.busy_for_s(1.5) == math.inf


def moved(divergence: float = 0.1, version: int = 10, block: BlockId = A, share: float = 0.5) -> BlockResult:
    """Of the next exchange of a block in a test; only differences of `moved` count."""
    return BlockResult(
        block=block,
        divergence=divergence,
        clipped_rows=0,
        version_gap=0,
        version=version,
        partner_share=share,
        moved=REPLICAS.moved(block, divergence),
    )


def test_while_others_are_busy_a_partner_met_lately_is_not_met_again_but_a_new_one_is() -> None:
    history = History(0.0)
    history.met(A, "met", 10.0, moved())
    history.busy("busy", 10.0, 5.0)
    three = replica("met"), replica("busy"), replica("new")
    assert [c.peer_id for c in found(history, 10.1, *three)] == ["new"]
    assert found(history, 10.1, *three[:2]) == ()
    assert [c.peer_id for c in found(history, 10.1, three[0])] == ["met"]
    assert [c.peer_id for c in found(history, 10.0 + FRESH_S, *three[:2])] == ["met"]


def test_a_partner_that_failed_is_not_waited_for() -> None:
    history = History(0.0)
    history.met(A, "met", 10.0, moved())
    history.failed("gone", 10.0)
    assert [c.peer_id for c in found(history, 10.1, replica("met"), replica("gone"))] == ["met"]


def test_a_pair_that_was_found_together_rests_until_either_side_learns() -> None:
    history = History(0.0)
    history.met(A, "p", 1.0, moved(0.1))
    assert found(history, 2.0, replica("p"))  # what the codec left out of a large difference
    history.met(A, "p", 2.0, moved(SETTLED / 2))
    assert found(history, 3.0, replica("p")) == ()
    assert found(history, 3.0, replica("p", version=11))
    assert candidates({A: 11}, lambda _: [replica("p")], OWN, history, 3.0)
    assert found(history, 3.0, replica("p", version=9)) == ()  # announced before the exchange
    assert found(history, 2.0 + QUIET_S, replica("p"))


def test_a_pair_that_rests_has_news_once_the_block_moved_with_another() -> None:
    history = History(0.0)
    for peer_id in ("p", "q"):
        history.met(A, peer_id, 1.0, moved(0.0))
    history.met(B, "q", 2.0, moved(0.1, block=B))
    assert found(history, 3.0, replica("p")) == ()
    history.met(A, "q", 2.0, moved(0.1))
    (p,) = found(history, 3.0, replica("p"), replica("p", B))
    assert p.blocks == (B, A)


def test_a_pair_waits_until_its_steps_have_moved_it_apart_enough_to_be_worth_an_exchange() -> None:
    history = History(0.0)

    def due(now_s: float, version: int, rest_s: float = 1.0) -> bool:
        return bool(candidates({A: version}, lambda _: [replica("p", version=0)], OWN, history, now_s, rest_s))

    history.met(A, "p", 10.0, moved(0.1, version=10))
    assert due(12.0, 11), "one meeting does not tell how fast it drifts"
    history.met(A, "p", 20.0, moved(WORTH_IT, version=20))  # a tenth of that in a step
    assert due(20.1, 21, 0.0), "who asks for an exchange by itself gets one"
    assert not due(22.0, 29)
    assert due(22.0, 30)
    assert not due(20.9, 30), "at most once in so many seconds"
    assert due(20.0 + LONGEST_REST_S, 21)


def test_a_pair_that_hardly_drifts_meets_soon_after_one_of_it_moved_far_with_another() -> None:
    history = History(0.0)

    def due(now_s: float) -> bool:
        return bool(candidates({A: 20}, lambda _: [replica("p", version=0)], OWN, history, now_s, 1.0))

    for at_s, version in ((10.0, 10), (20.0, 19)):
        history.met(A, "p", at_s, moved(0.0, version=version))
    assert not due(22.0), "a step moves them by nothing"
    history.met(A, "q", 22.0, moved(WORTH_IT / 2))
    assert not due(23.0)
    history.met(A, "q", 23.0, moved(WORTH_IT / 2 + SETTLED))
    assert due(24.0)


def test_a_pair_that_hardly_drifted_over_few_steps_meets_again_after_few() -> None:
    history = History(0.0)

    def due(now_s: float, version: int) -> bool:
        return bool(candidates({A: version}, lambda _: [replica("p", version=0)], OWN, history, now_s, 1.0))

    for version in (0, 0):  # announced, caught up: no step in between
        history.met(A, "p", 1.0, moved(0.0, version=version))
    assert not due(3.0, 0)
    assert due(3.0, 1), "no step has shown yet how fast it drifts"
    history.met(A, "p", 3.0, moved(0.0, version=3))
    assert not due(5.0, 3 + 3 * MOST_GROWTH)
    assert due(5.0, 4 + 3 * MOST_GROWTH), "rates may have risen meanwhile"


def test_a_meeting_that_is_told_late_hides_no_move_that_came_after_it() -> None:
    history = History(0.0)
    for peer_id in ("p", "q"):
        history.met(A, peer_id, 1.0, moved(0.0))
    first, second = moved(0.1), moved(0.2)
    history.met(A, "q", 2.0, second)
    history.met(A, "p", 2.1, first)  # it met first, in an exchange of more blocks
    assert [c.peer_id for c in found(history, 3.0, replica("p"), replica("q"))] == ["p", "q"]
    history.met(A, "p", 3.0, moved(SETTLED / 4))
    assert [c.peer_id for c in found(history, 4.0, replica("p"), replica("q"))] == ["q"]  # what the codec left out


def test_no_distance_however_large_drowns_the_news_of_later_ones() -> None:
    history = History(0.0)
    for divergence in (1e30, 0.0):
        history.met(A, "p", 1.0, moved(divergence))
    assert found(history, 2.0, replica("p")) == ()
    history.met(A, "q", 2.0, moved(0.001))
    assert found(history, 3.0, replica("p"))


def test_one_quiet_meeting_does_not_make_a_pair_rest_for_long() -> None:
    history = History(0.0)

    def steps_it_waits() -> int:
        met, them = history._met[A, "p"], [replica("p", version=0)]
        later_s = met.at_s + 5.0
        tried = ((n, candidates({A: met.version + n}, lambda _: them, OWN, history, later_s, 1.0)) for n in count(1))
        return next(n for n, due in tried if due)

    history.met(A, "p", 10.0, moved(0.1, version=10))
    history.met(A, "p", 20.0, moved(WORTH_IT, version=20))
    assert steps_it_waits() == 10
    history.met(A, "p", 30.0, moved(0.0, version=21))
    assert 10 < steps_it_waits() < 20
    for doublings in range(1, 25):
        history.met(A, "p", 30.0, moved(0.0, version=21 << doublings))
    assert steps_it_waits() > 1000


def test_a_block_that_was_refused_is_due_again() -> None:
    history = History(0.0)
    history.met(A, "p", 1.0, moved(0.0))
    history.met(A, "p", 2.0)
    assert found(history, 3.0, replica("p"))


def test_latency_follows_what_is_measured_and_outlives_a_failure() -> None:
    history = History(0.0)
    assert history.latency_s("p") == 0.0
    history.answered("p", 1.0)
    assert history.latency_s("p") == 1.0
    history.answered("p", 2.0)
    assert 1.0 < history.latency_s("p") < 2.0
    measured_s = history.latency_s("p")
    history.failed("p", 0.0)
    assert history.latency_s("p") == measured_s
    for _ in range(50):
        history.answered("p", 2.0)
    assert abs(history.latency_s("p") - 2.0) < 1e-6


def test_dialling_in_under_many_names_fills_no_memory_and_forgets_the_oldest() -> None:
    history = History(0.0)
    history.met(A, "old", 5.0)
    history.answered("old", 3.0)
    for i in range(MAX_PAIRS):
        history.met(A, f"name {i}", 6.0)
    for i in range(MAX_PARTNERS):
        history.failed(f"name {i}", 6.0)
    assert history.seconds_since(A, "old", 7.0) == 7.0
    assert history.latency_s("old") == 0.0
    assert history.seconds_since(A, "name 0", 7.0) == 1.0
    assert history.avoids("name 0", 6.1)
    assert len(history._met) == MAX_PAIRS
    assert len(history._partners) == MAX_PARTNERS


def test_a_partners_share_of_the_work_is_an_average_over_meetings() -> None:
    history = History(0.0)
    assert history.shares(A, 0) == ()
    history.met(A, "p", 1.0, moved(share=0.5))
    assert history.shares(A, 10) == (0.5,)
    history.met(A, "p", 2.0, moved(share=0.0))
    assert history.shares(A, 10) == pytest.approx((0.4,))
    for _ in range(40):
        history.met(A, "p", 3.0, moved(share=0.0))
    assert history.shares(A, 10) == pytest.approx((0.0,), abs=1e-3), "it learns no more"


def test_partners_that_would_not_or_are_long_gone_or_hold_another_block_have_no_share() -> None:
    history = History(0.0)
    history.met(A, "refused", 1.0)
    history.met(B, "elsewhere", 1.0, moved(block=B))
    assert history.shares(A, 0) == ()
    history.met(A, "p", 1.0, moved(version=10))
    assert history.shares(A, 10 + LASTING_STEPS) == (0.5,)
    assert history.shares(A, 11 + LASTING_STEPS) == ()
