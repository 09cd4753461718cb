"""What peers and teams have earned: only those who were seen in the run, and no more than trainers announce."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from protocol.profile import Profile
from tests.support.crediting import HOST, RECEIPT, RUN, STRANGER, TRAINER, minutes, receipt
from tests.support.ledgers import both, ledger_in, member, sums_of, take

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coordinator.credit.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with ledger_in(tmp_path) as made:
        yield made


def test_hosts_earn_pairs_and_trainers_the_tokens_that_these_come_to(ledger: Ledger) -> None:
    ledger.see(both())
    take(ledger, minutes(3))
    sums = sums_of(ledger)
    (host,), (trainer,) = sums.hosts, sums.trainers
    assert sums.run_id == RUN
    assert (host.peer_id, host.forward_pairs, host.backward_pairs, host.receipts) == (HOST.peer_id, 6000, 3000, 3)
    assert (trainer.peer_id, trainer.tokens_learnt, trainer.receipts) == (TRAINER.peer_id, 300, 3)
    assert (host.name, host.team, sums.teams) == ("", "", ())
    assert not trainer.capped


def test_nobody_earns_who_was_not_seen_in_the_run_and_everybody_once_he_is(ledger: Ledger) -> None:
    take(ledger, minutes(3))
    for members in ([], both()[:1], [member(TRAINER, "host", 1 << 40)]):
        ledger.see(members)
        assert (sums_of(ledger).hosts, sums_of(ledger).trainers, sums_of(ledger).unseen_receipts) == ((), (), 3)
    ledger.see(both())
    assert (sums_of(ledger).hosts[0].receipts, sums_of(ledger).unseen_receipts) == (3, 0)


@pytest.mark.parametrize(
    ("own_tokens", "forward", "backward", "tokens"),
    [(0, 0, 0, 0), (50, 1000, 500, 50), (100, 2000, 1000, 100), (10**6, 2000, 1000, 100)],
)
def test_a_trainers_receipts_come_to_no_more_than_it_has_announced(
    ledger: Ledger, own_tokens: int, forward: int, backward: int, tokens: int
) -> None:
    ledger.see(both(own_tokens))
    take(ledger, [RECEIPT])
    (host,), (trainer,) = sums_of(ledger).hosts, sums_of(ledger).trainers
    assert (host.forward_pairs, host.backward_pairs) == (forward, backward)
    assert (trainer.tokens_learnt, trainer.own_tokens) == (tokens, own_tokens)
    assert trainer.capped == (own_tokens < 100)


def test_what_a_trainer_announces_later_counts_and_what_it_announced_stays(ledger: Ledger) -> None:
    take(ledger, [RECEIPT])
    for own_tokens, backward in ((50, 500), (80, 800), (10, 800)):
        ledger.see(both(own_tokens))
        assert sums_of(ledger).hosts[0].backward_pairs == backward


def test_a_cap_is_shared_by_the_trainers_hosts_and_touches_no_other_trainer(ledger: Ledger) -> None:
    ledger.see([*both(100), member(STRANGER, "host"), member(STRANGER, "trainer", 100)])
    take(
        ledger,
        [
            receipt(backward_pairs=500),
            receipt(host=STRANGER.public_key, backward_pairs=1500),
            receipt(trainer=STRANGER.public_key, backward_pairs=700),
        ],
    )
    sums = sums_of(ledger)
    backward = {host.peer_id: host.backward_pairs for host in sums.hosts}
    assert backward == {HOST.peer_id: 250 + 700, STRANGER.peer_id: 750}
    assert {one.peer_id: one.tokens_learnt for one in sums.trainers} == {TRAINER.peer_id: 100, STRANGER.peer_id: 70}


def test_peers_are_told_by_what_they_earned_and_teams_add_theirs_up(ledger: Ledger) -> None:
    ledger.see([*both(), member(STRANGER, "host")])
    take(ledger, [RECEIPT, receipt(host=STRANGER.public_key, forward_pairs=9000)])
    ledger.name(HOST.peer_id, Profile(name="Ada", team="Engines"))
    ledger.name(TRAINER.peer_id, Profile(team="Engines"))
    sums = sums_of(ledger)
    assert [(host.peer_id, host.name) for host in sums.hosts] == [(STRANGER.peer_id, ""), (HOST.peer_id, "Ada")]
    (team,) = sums.teams
    assert (team.team, team.peers, team.forward_pairs, team.backward_pairs) == ("Engines", 2, 2000, 1000)
    assert team.tokens_learnt == 200
    ledger.name(HOST.peer_id, None)
    assert sums_of(ledger).teams[0].peers == 1
