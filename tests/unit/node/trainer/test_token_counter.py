"""The run's clock: every trainer's tokens count once, whoever leaves, and nobody's total runs ahead of the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from dht.view import PeerInfo
from node.trainer.token_counter import MAX_TRAINERS, TokenCounter
from protocol.limits import MAX_RUN_TOKENS

if TYPE_CHECKING:
    from protocol.announcements import Role


def said(peer_id: str, own_tokens: int, run_tokens: int = 0, role: Role = "trainer") -> PeerInfo:
    return PeerInfo(
        peer_id=peer_id,
        role=role,
        endpoint="",
        software="",
        started_s=0.0,
        n_blocks=0,
        tokens_per_s=0.0,
        run_tokens=run_tokens,
        queue_tokens=0,
        expiration_s=2e9,
        own_tokens=own_tokens,
    )


def test_own_tokens_count_exactly() -> None:
    tokens = TokenCounter("me")
    tokens.add(100)
    tokens.add(28)
    assert (tokens.total, tokens.own, tokens.n_trainers) == (128, 128, 1)


def test_others_tokens_are_added_and_stay_when_they_leave() -> None:
    tokens = TokenCounter("me")
    tokens.add(100)
    tokens.observe([said("b", 40), said("c", 2)])
    tokens.observe([said("c", 3)])
    tokens.observe([])
    assert tokens.total == 143
    assert tokens.others == {"b": 40, "c": 3}
    assert tokens.n_trainers == 3


def test_a_trainer_that_lost_its_count_takes_nothing_back() -> None:
    tokens = TokenCounter("me")
    tokens.observe([said("b", 40)])
    tokens.observe([said("b", 5)])
    assert tokens.total == 40


def test_only_other_trainers_count() -> None:
    tokens = TokenCounter("me", own=10)
    tokens.observe([said("me", 99, 99), said("h", 50, 50, "host"), said("c", 60, 60, "coordinator")])
    assert tokens.total == 10


def test_a_newcomer_starts_at_the_runs_total_and_both_rates_count_from_there() -> None:
    tokens = TokenCounter("me")
    tokens.observe([said("b", 40, 1000)])  # of which 960 by trainers that are gone
    assert tokens.total == 1000
    tokens.add(7)
    assert tokens.total == 1007
    tokens.observe([said("b", 50, 1010)])
    assert tokens.total == 1017
    tokens.observe([])
    tokens.add(3)
    assert tokens.total == 1020


def test_what_the_floor_already_holds_of_a_third_trainer_is_not_counted_twice() -> None:
    tokens = TokenCounter("me")
    tokens.observe([said("b", 40, 1000), said("c", 5, 900)])  # b knew more of c than c's old record says
    tokens.observe([said("b", 40, 1000), said("c", 30, 990)])
    assert tokens.total == 1000
    tokens.observe([said("b", 40, 1000), said("c", 35, 995)])
    assert tokens.total == 1005


def test_a_resumed_trainer_goes_on_from_its_checkpoint() -> None:
    tokens = TokenCounter("me", own=60, others={"b": 40}, floor=1000)
    assert (tokens.total, tokens.own, tokens.n_trainers) == (1000, 60, 2)
    tokens.add(10)
    assert tokens.total == 1010


def test_no_number_of_trainers_fills_the_memory() -> None:
    tokens = TokenCounter("me")
    tokens.observe([said(f"t{n}", 1) for n in range(2 * MAX_TRAINERS)])
    assert len(tokens.others) == MAX_TRAINERS - 1
    tokens.observe([said(f"t{2 * MAX_TRAINERS}", 1, 10**6)])
    assert tokens.total == 10**6


def test_a_liar_pushes_the_total_no_further_than_peers_accept() -> None:
    tokens = TokenCounter("me")
    tokens.observe([said("liar", MAX_RUN_TOKENS, MAX_RUN_TOKENS), said("other", MAX_RUN_TOKENS)])
    tokens.add(100)
    assert tokens.total == MAX_RUN_TOKENS


@dataclass
class World:
    """Trainers that train, announce, look, join and leave in any order."""

    truth: int = 0
    live: dict[str, TokenCounter] = field(default_factory=dict)
    records: dict[str, PeerInfo] = field(default_factory=dict)

    def join(self, name: str) -> None:
        self.live[name] = TokenCounter(name)
        self.look(name)
        self.announce(name)

    def train(self, name: str, n_tokens: int) -> None:
        self.live[name].add(n_tokens)
        self.truth += n_tokens

    def announce(self, name: str) -> None:
        self.records[name] = said(name, self.live[name].own, self.live[name].total)

    def look(self, name: str) -> None:
        before = self.live[name].total
        self.live[name].observe(self.records.values())
        assert before <= self.live[name].total <= self.truth

    def leave(self, name: str) -> None:
        self.announce(name)
        for other in self.live:
            self.look(other)
        del self.live[name], self.records[name]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["join", "train", "announce", "look", "leave"]), st.integers(0, 7), st.integers(1, 100)),
    max_size=200,
)


@given(ACTIONS)
def test_no_total_goes_back_or_ahead_of_the_truth_and_those_who_saw_it_all_know_it(
    actions: list[tuple[str, int, int]],
) -> None:
    world = World()
    world.join("founder")
    for number, (action, index, n_tokens) in enumerate(actions):
        names = sorted(world.live)
        name = names[index % len(names)]
        match action:
            case "join":
                world.join(f"t{number}")
            case "train":
                world.train(name, n_tokens)
            case "announce":
                world.announce(name)
            case "look":
                world.look(name)
            case "leave" if name != "founder":
                world.leave(name)
    for _ in range(2):
        for name in world.live:
            world.announce(name)
        for name in world.live:
            world.look(name)
    assert world.live["founder"].total == world.truth
    assert all(tokens.total == world.truth for tokens in world.live.values())
