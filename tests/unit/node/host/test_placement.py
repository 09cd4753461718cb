from __future__ import annotations

import random
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from dht.view import DirectoryView, PeerInfo
from node.host.placement import (
    Joiner,
    PlacementConfig,
    PlacementPlan,
    PlacementView,
    joining_since,
    may_drop,
    overdue,
    parse_blocks,
    placement_view,
    plan,
)
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import make_replica, small_manifest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

MODEL = small_manifest().model
A, B, C, D = (BlockId(0, index) for index in range(4))
ME = "me"
LONG_S = 1e6
TARGET = 2


def idle_host(peer_id: str) -> PeerInfo:
    return PeerInfo(
        peer_id=peer_id,
        role="host",
        endpoint="127.0.0.1:1",
        software="",
        started_s=0.0,
        n_blocks=0,
        tokens_per_s=0.0,
        run_tokens=0,
        queue_tokens=0,
        expiration_s=2e9,
    )


def directory(
    serving: Mapping[BlockId, Iterable[str]],
    *,
    joining: Collection[tuple[BlockId, str]] = (),
    idle: Iterable[str] = (),
    queues: Mapping[str, int] | None = None,
    taken_s: float = 0.0,
) -> DirectoryView:
    """What a directory shows when these peers serve, join and idle; `queues` are tokens by peer."""

    def tokens(peer_id: str) -> int:
        return (queues or {}).get(peer_id, 0)

    return DirectoryView(
        taken_s=taken_s,
        replicas=MappingProxyType(
            {
                block: tuple(replace(make_replica(block, peer, "h:1"), queue_tokens=tokens(peer)) for peer in peers)
                for block, peers in serving.items()
            }
        ),
        others=tuple(replace(make_replica(block, peer, "h:1"), state="joining") for block, peer in joining),
        peers=tuple(map(idle_host, idle)),
    )


def config(max_blocks: int = 1, **changes: Any) -> PlacementConfig:
    return replace(PlacementConfig(max_blocks=max_blocks, target_replicas=TARGET), **changes)


def some(n: int, name: str = "peer") -> list[str]:
    return [f"{name}{index}" for index in range(n)]


def who_may_drop(block: BlockId, holders: list[str], keep: int = TARGET) -> list[str]:
    return [peer for peer in holders if may_drop(placement_view(directory({block: holders}), peer), block, keep)]


def spare_holders(block: BlockId, n: int) -> tuple[str, list[str]]:
    """A peer that may drop the block, and the n - 1 others that hold it too."""
    holders = some(n)
    spare = who_may_drop(block, holders)[0]
    return spare, [peer for peer in holders if peer != spare]


class TestParsing:
    def test_blocks_are_named_by_layer_and_range(self) -> None:
        assert parse_blocks("0/0-2, 1/3,0/1", MODEL) == [BlockId(0, 0), BlockId(0, 1), BlockId(0, 2), BlockId(1, 3)]

    @pytest.mark.parametrize("text", ["", "0", "0/", "a/1", "0/1-", "0/3-1", "2/0", "0/4", "0/0-4", "0/0;1/1", "-1/0"])
    def test_a_wrong_name_is_a_usage_error_that_quotes_it(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"--blocks: "):
            parse_blocks(text, MODEL)


class TestFreeRoom:
    def test_blocks_without_a_replica_come_first_then_too_few_then_the_most_loaded(self) -> None:
        view = directory(
            {A: ["p", "q"], B: ["r", "s"], C: ["p"], D: []}, queues={"p": 0, "q": 0, "r": 10**9, "s": 10**9}
        )
        for seed in range(50):
            taken = plan(placement_view(view, ME), {}, (), config(4), random.Random(seed)).take
            assert taken == (D, C, B, A)

    def test_no_more_than_there_is_room_for(self) -> None:
        view = placement_view(directory({A: [], B: [], C: [], D: []}), ME)
        planned = plan(view, {A: 0.0}, (), config(3), random.Random(0))
        assert len(planned.take) == 2
        assert A not in planned.take
        assert not planned.drop
        assert plan(view, dict.fromkeys((A, B, C, D), 0.0), (), config(9), random.Random(0)) == PlacementPlan()

    def test_a_checkpoint_of_ones_own_wins_ties_and_nothing_else(self) -> None:
        view = placement_view(directory({A: [], B: [], C: ["p"], D: ["p"]}), ME)
        for seed in range(50):
            taken = plan(view, {}, {B, D}, config(4), random.Random(seed)).take
            assert taken == (B, A, D, C)

    def test_who_joins_counts_as_a_replica(self) -> None:
        view = placement_view(directory({A: [], B: []}, joining=[(A, "p")]), ME)
        assert {plan(view, {}, (), config(), random.Random(seed)).take for seed in range(50)} == {(B,)}

    def test_who_joins_for_too_long_no_longer_counts(self) -> None:
        first = directory({A: [], B: ["q"]}, joining=[(A, "p"), (A, "r")], taken_s=100.0)
        later = replace(first, taken_s=500.0, others=(*first.others[:1], replace(first.others[1], block=B)))
        since = joining_since(later, joining_since(first, {}))
        assert since == {Joiner(A, "p"): 100.0, Joiner(B, "r"): 500.0}
        assert overdue(since, 400.0, config()) == frozenset()
        ignored = overdue(since, 401.0, config())
        view = placement_view(later, ME, ignored)
        assert plan(view, {}, (), config(), random.Random(0)).take == (A,)
        assert view.holders[B] == {"q", "r"}

    def test_what_the_directory_still_says_of_this_host_is_not_looked_at(self) -> None:
        view = placement_view(directory({A: [ME], B: ["p"]}, joining=[(B, ME)], idle=[ME]), ME)
        assert plan(view, {}, (), config(), random.Random(0)).take == (A,)
        assert view.competitors() == 0

    def test_a_lone_host_fills_its_room_on_an_empty_swarm(self) -> None:
        view = placement_view(directory(dict.fromkeys(all_blocks(MODEL), ())), ME)
        assert sorted(plan(view, {}, (), config(100), random.Random(0)).take) == all_blocks(MODEL)

    def test_the_most_loaded_are_likelier_but_not_certain(self) -> None:
        view = placement_view(directory({A: ["p", "q"], B: ["r", "s"]}, queues={"p": 40_000, "q": 40_000}), ME)
        taken = [plan(view, {}, (), config(), random.Random(seed)).take[0] for seed in range(200)]
        assert 150 < taken.count(A) < 200


class TestHerds:
    def test_hosts_that_start_together_on_an_empty_swarm_cover_it(self) -> None:
        hosts = some(30)
        view = directory(dict.fromkeys(all_blocks(MODEL), ()), idle=hosts)
        rng = random.Random(0)
        taken = [plan(placement_view(view, host), {}, (), config(2), rng).take for host in hosts]
        assert all(len(blocks) == 2 for blocks in taken)
        assert {block for blocks in taken for block in blocks} == set(all_blocks(MODEL))

    def test_of_30_newcomers_about_six_take_the_one_lost_block(self) -> None:
        hosts = some(30)
        view = directory({A: [], **dict.fromkeys((B, C, D), ("x", "y"))}, idle=hosts)
        takers = []
        for seed in range(40):
            rng = random.Random(seed)
            taken = [plan(placement_view(view, host), {}, (), config(), rng).take for host in hosts]
            assert all(len(blocks) == 1 for blocks in taken)
            takers.append(taken.count((A,)))
        assert 5 < sum(takers) / len(takers) < 7  # surge times target
        assert min(takers) >= 1
        assert max(takers) <= 14

    def test_of_30_full_hosts_with_a_block_to_spare_about_six_move_to_the_lost_one(self) -> None:
        holders = some(32)
        view = directory({A: holders, B: []})
        movers = []
        for seed in range(40):
            rng = random.Random(seed)
            plans = [plan(placement_view(view, host), {A: LONG_S}, (), config(), rng) for host in holders]
            movers.append(plans.count(PlacementPlan(take=(B,), drop=(A,))))
        assert 5 < sum(movers) / len(movers) < 7
        assert max(movers) <= 14

    def test_a_paused_host_is_no_rival(self) -> None:
        view = directory({A: []}, idle=["working", "resting"])
        resting = tuple(replace(peer, paused=peer.peer_id == "resting") for peer in view.peers)
        assert placement_view(replace(view, peers=resting), ME).competitors() == 1

    def test_invented_idle_hosts_slow_a_claim_down_but_never_to_nothing(self) -> None:
        view = placement_view(directory({A: [], B: ["p", "q"]}, idle=some(100_000, "sybil")), ME)
        claims = [plan(view, {}, (), config(), random.Random(seed)).take == (A,) for seed in range(1000)]
        assert 10 < sum(claims) < 60


class TestFullHost:
    def test_it_gives_a_spare_replica_for_a_block_that_lacks_one(self) -> None:
        me, others = spare_holders(A, 3)
        view = placement_view(directory({A: [*others, me], B: ["p"], C: ["p", "q"]}), me)
        assert plan(view, {A: LONG_S}, (), config(), random.Random(0)) == PlacementPlan(take=(B,), drop=(A,))

    def test_one_at_a_time(self) -> None:
        holders = some(9)
        me = next(iter(set(who_may_drop(A, holders)) & set(who_may_drop(B, holders))))
        view = placement_view(directory({A: holders, B: holders, C: [], D: []}), me)
        planned = plan(view, {A: LONG_S, B: LONG_S}, (), config(2, surge=1e6), random.Random(0))
        assert len(planned.take) == len(planned.drop) == 1

    def test_it_stays_until_all_its_blocks_have_stayed_for_a_while(self) -> None:
        me, others = spare_holders(A, 3)
        view = placement_view(directory({A: [*others, me], B: ["p"], C: [me]}), me)
        assert plan(view, {A: LONG_S, C: 299.0}, (), config(2), random.Random(0)) == PlacementPlan()
        assert plan(view, {A: LONG_S, C: 300.0}, (), config(2), random.Random(0)).take == (B,)

    def test_a_lost_block_does_not_wait(self) -> None:
        me, others = spare_holders(A, 3)
        view = placement_view(directory({A: [*others, me], B: []}), me)
        assert plan(view, {A: 0.0}, (), config(), random.Random(0)) == PlacementPlan(take=(B,), drop=(A,))

    def test_nobody_lacks_anything_then_nothing_moves(self) -> None:
        me, others = spare_holders(A, 12)
        view = placement_view(directory({A: [*others, me], B: ["p", "q"]}), me)
        assert {plan(view, {A: LONG_S}, (), config(), random.Random(seed)) for seed in range(50)} == {PlacementPlan()}

    def test_a_block_at_its_target_stays_where_another_merely_lacks_one(self) -> None:
        holders = some(TARGET)
        for me in holders:
            view = placement_view(directory({A: holders, B: ["p"]}), me)
            assert plan(view, {A: LONG_S}, (), config(), random.Random(0)) == PlacementPlan()

    def test_for_a_lost_block_one_of_two_holders_moves_if_nobody_has_any_to_spare(self) -> None:
        holders = some(TARGET)
        view = directory({A: holders, B: []})
        plans = [plan(placement_view(view, me), {A: 0.0}, (), config(), random.Random(0)) for me in holders]
        assert sorted(plans, key=lambda planned: planned.take) == [PlacementPlan(), PlacementPlan(take=(B,), drop=(A,))]

    def test_the_last_replica_is_never_given_up_not_even_for_a_lost_block(self) -> None:
        view = placement_view(directory({A: [ME], B: []}, joining=[(A, "p"), (A, "q")]), ME)
        assert {plan(view, {A: LONG_S}, (), config(), random.Random(seed)) for seed in range(50)} == {PlacementPlan()}

    def test_the_block_with_most_replicas_goes(self) -> None:
        few, many = some(3), some(9)
        me = next(iter(set(who_may_drop(A, few)) & set(who_may_drop(B, many))))
        view = placement_view(directory({A: few, B: many, C: []}), me)
        planned = plan(view, {A: LONG_S, B: LONG_S}, (), config(2, surge=1e6), random.Random(0))
        assert planned.drop == (B,)


class TestLoad:
    def loaded(self, queue_tokens: int, other: str = "", n: int = 3) -> PlacementView:
        """A host with a spare replica of A, whose peers have 2000 tokens waiting; those of B `queue_tokens`."""
        self.me, others = spare_holders(A, n)
        hosted: dict[BlockId, list[str]] = {A: [*others, self.me], B: ["p", "q"], C: ["p", "q"]}
        queues = dict.fromkeys([*others, self.me], 2000) | {"p": queue_tokens, "q": queue_tokens}
        return placement_view(directory(hosted | ({D: [other]} if other else {}), queues=queues), self.me)

    def moved(self, view: PlacementView, **changes: Any) -> int:
        own = {A: LONG_S}
        return sum(plan(view, own, (), config(**changes), random.Random(s)) != PlacementPlan() for s in range(20))

    def test_a_full_host_moves_only_to_where_far_more_waits(self) -> None:
        assert self.moved(self.loaded(7900)) == 0
        assert self.moved(self.loaded(8000)) == 20
        assert self.moved(self.loaded(8000), load_gain=5.0) == 0

    def test_a_few_tokens_more_are_no_load_however_idle_the_others_are(self) -> None:
        view = self.loaded(4095)
        idle = replace(view, load_tokens={**view.load_tokens, A: 0.0})
        assert self.moved(idle) == 0
        assert self.moved(idle, min_load_tokens=4000.0) == 20

    def test_load_waits_until_no_block_lacks_a_replica(self) -> None:
        view = self.loaded(8000, other="r")
        assert {plan(view, {A: LONG_S}, (), config(), random.Random(s)).take for s in range(20)} == {(D,)}


HOLDERS = st.lists(st.sampled_from(some(12)), unique=True, max_size=12)
SERVED = st.fixed_dictionaries(dict.fromkeys((A, B, C, D), HOLDERS))


class TestSafety:
    @pytest.mark.parametrize("keep", [1, 2, 3])
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 30])
    def test_when_all_holders_act_on_the_same_view_as_many_stay_as_must(self, keep: int, n: int) -> None:
        assert n - len(who_may_drop(A, some(n), keep)) == min(n, keep)

    def test_blocks_are_spared_by_different_peers(self) -> None:
        holders = some(8)
        assert len({tuple(who_may_drop(block, holders)) for block in all_blocks(MODEL)}) > 1

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_however_old_and_different_their_views_are_enough_holders_stay(self, data: st.DataObject) -> None:
        """Holders act one after another; each sees any of those who ever held the block, the ones gone included."""
        keep = data.draw(st.integers(1, 3))
        holders = data.draw(st.lists(st.sampled_from(some(12)), unique=True, min_size=1))
        left = set(holders)
        for me in data.draw(st.permutations(holders)):
            seen = data.draw(st.sets(st.sampled_from(holders)))
            if may_drop(placement_view(directory({A: seen}), me), A, keep):
                left.remove(me)
        assert len(left) >= min(keep, len(holders))

    @settings(deadline=None, max_examples=200)
    @given(served=SERVED, joining=st.sets(st.tuples(st.sampled_from((A, B, C, D)), st.sampled_from(some(12)))))
    def test_when_all_hosts_follow_their_plans_at_once_nothing_falls_below_what_it_must_keep(
        self, served: dict[BlockId, list[str]], joining: set[tuple[BlockId, str]]
    ) -> None:
        view = directory(served, joining=joining)
        lost = {block for block, peers in served.items() if not peers}
        after = {block: set(peers) for block, peers in served.items()}
        for me in some(12):
            own = {block: LONG_S for block, peers in served.items() if me in peers}
            cfg = config(max(len(own), 1), surge=1e6)
            planned = plan(placement_view(view, me), own, (), cfg, random.Random(me))
            assert not set(planned.take) & own.keys()
            assert len(own) + len(planned.take) - len(planned.drop) <= cfg.max_blocks
            for block in planned.drop:
                after[block].remove(me)
        for block, peers in served.items():
            keep = 1 if lost else TARGET
            assert len(after[block]) >= min(keep, len(peers))
