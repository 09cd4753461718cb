"""What peers and teams have earned, from a ledger: a pure reading of it, the same for whoever has the same receipts.

A receipt earns for peers that were both seen in the run. What a trainer's receipts come to is capped by what it says,
in signed records, that it has trained on: beyond that all hosts of its receipts get a proportional part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from protocol.identity import peer_id_of
from protocol.receipts import pairs_per_token, tokens_learnt

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from coordinator.credit.ledger import Ledger
    from protocol.manifest import ModelConfig

FORWARDS_PER_TOKEN = 2
"""Times that a token which a trainer learns from may pass the experts forward: once to learn, and once more for
evaluations and for micro-batches that were begun again."""


@dataclass(frozen=True, kw_only=True)
class HostSum:
    """What a host has earned: pairs that it answered. Name and team are as its owner wants, and may be empty."""

    peer_id: str
    name: str
    team: str
    forward_pairs: int
    backward_pairs: int
    receipts: int


@dataclass(frozen=True, kw_only=True)
class TrainerSum:
    """What a trainer has earned: tokens learnt, going by the backward pairs that hosts confirm.

    `own_tokens`: what it says itself. `capped`: its receipts come to more than that, and count in part.
    """

    peer_id: str
    name: str
    team: str
    tokens_learnt: int
    own_tokens: int
    receipts: int
    capped: bool


@dataclass(frozen=True, kw_only=True)
class TeamSum:
    """What those come to who say that they are of one team."""

    team: str
    peers: int
    forward_pairs: int
    backward_pairs: int
    tokens_learnt: int


@dataclass(frozen=True, kw_only=True)
class CreditSums:
    """What all have earned, those with most first.

    `unseen_receipts` are of peers that were never seen in the run: they earn nothing until they are.
    """

    run_id: str
    hosts: tuple[HostSum, ...]
    trainers: tuple[TrainerSum, ...]
    teams: tuple[TeamSum, ...]
    unseen_receipts: int


class _Cap(NamedTuple):
    """How much of a trainer's receipts counts: `most` pairs of the `claimed` ones, forward and backward apart."""

    claimed: tuple[int, int]
    most: tuple[int, int]

    def of(self, pairs: tuple[int, int]) -> tuple[int, int]:
        """The part of one host's pairs that counts."""
        forward, backward = (
            n if claimed <= most else n * most // claimed
            for n, claimed, most in zip(pairs, self.claimed, self.most, strict=True)
        )
        return forward, backward

    @property
    def is_exceeded(self) -> bool:
        return any(claimed > most for claimed, most in zip(self.claimed, self.most, strict=True))


@dataclass
class _Earned:
    """What one peer has earned in the receipts that were added so far."""

    forward: int = 0
    backward: int = 0
    receipts: int = 0

    def add(self, pairs: tuple[int, int], receipts: int) -> None:
        self.forward += pairs[0]
        self.backward += pairs[1]
        self.receipts += receipts


@dataclass
class _TeamEarned:
    peers: set[int] = field(default_factory=set)
    pairs: _Earned = field(default_factory=_Earned)
    tokens: int = 0


class _Peer(NamedTuple):
    """One that was seen in the run, as the ledger has it."""

    n: int
    key: bytes
    name: str
    team: str
    own_tokens: int


_SEEN = "JOIN peers AS h ON h.n = host AND h.is_host JOIN peers AS t ON t.n = trainer AND t.is_trainer"


def read_sums(ledger: Ledger, run_id: str, model: ModelConfig) -> CreditSums:
    """What everybody has earned by now. Raises StorageError. Blocks for as long as reading all pairs of peers takes."""
    with ledger.reading() as connection:
        caps = _caps(connection, model)
        hosts: dict[int, _Earned] = {}
        trainers: dict[int, _Earned] = {}
        rows = connection.execute(f"SELECT host, trainer, forward, backward, receipts FROM pairs {_SEEN}")  # noqa: S608 - ours
        for host, trainer, forward, backward, receipts in rows:
            pairs = caps[trainer].of((forward, backward))
            hosts.setdefault(host, _Earned()).add(pairs, receipts)
            trainers.setdefault(trainer, _Earned()).add(pairs, receipts)
        peers = _peers(connection, hosts.keys() | trainers.keys())
        all_receipts: int = connection.execute("SELECT coalesce(sum(receipts), 0) FROM pairs").fetchone()[0]
    return CreditSums(
        run_id=run_id,
        hosts=_host_sums(hosts, peers),
        trainers=_trainer_sums(trainers, peers, caps, model),
        teams=_team_sums(hosts, trainers, peers, model),
        unseen_receipts=all_receipts - sum(earned.receipts for earned in hosts.values()),
    )


def _caps(connection: sqlite3.Connection, model: ModelConfig) -> dict[int, _Cap]:
    """Return caps by a trainer's number. They are added up here, as sums that strangers sign may not fit SQLite."""
    claimed: dict[int, tuple[int, int]] = {}
    own_tokens: dict[int, int] = {}
    rows = connection.execute(f"SELECT trainer, t.own_tokens, forward, backward FROM pairs {_SEEN}")  # noqa: S608 - ours
    for trainer, tokens, forward, backward in rows:
        before = claimed.get(trainer, (0, 0))
        claimed[trainer], own_tokens[trainer] = (before[0] + forward, before[1] + backward), tokens
    per_token = pairs_per_token(model)
    return {
        trainer: _Cap(pairs, (FORWARDS_PER_TOKEN * per_token * own_tokens[trainer], per_token * own_tokens[trainer]))
        for trainer, pairs in claimed.items()
    }


def _peers(connection: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, _Peer]:
    wanted = set(numbers)
    rows = map(_Peer._make, connection.execute("SELECT n, key, name, team, own_tokens FROM peers"))
    return {peer.n: peer for peer in rows if peer.n in wanted}


def _host_sums(earned: dict[int, _Earned], peers: dict[int, _Peer]) -> tuple[HostSum, ...]:
    sums = [
        HostSum(
            peer_id=peer_id_of(peers[n].key),
            name=peers[n].name,
            team=peers[n].team,
            forward_pairs=of_host.forward,
            backward_pairs=of_host.backward,
            receipts=of_host.receipts,
        )
        for n, of_host in earned.items()
    ]
    return tuple(sorted(sums, key=lambda one: (-one.forward_pairs - one.backward_pairs, one.peer_id)))


def _trainer_sums(
    earned: dict[int, _Earned], peers: dict[int, _Peer], caps: dict[int, _Cap], model: ModelConfig
) -> tuple[TrainerSum, ...]:
    sums = [
        TrainerSum(
            peer_id=peer_id_of(peers[n].key),
            name=peers[n].name,
            team=peers[n].team,
            tokens_learnt=tokens_learnt(of_trainer.backward, model),
            own_tokens=peers[n].own_tokens,
            receipts=of_trainer.receipts,
            capped=caps[n].is_exceeded,
        )
        for n, of_trainer in earned.items()
    ]
    return tuple(sorted(sums, key=lambda one: (-one.tokens_learnt, one.peer_id)))


def _team_sums(
    hosts: dict[int, _Earned], trainers: dict[int, _Earned], peers: dict[int, _Peer], model: ModelConfig
) -> tuple[TeamSum, ...]:
    teams: dict[str, _TeamEarned] = {}
    for n in [n for n, peer in peers.items() if peer.team]:
        team = teams.setdefault(peers[n].team, _TeamEarned())
        team.peers.add(n)
        as_host = hosts.get(n, _Earned())
        team.pairs.add((as_host.forward, as_host.backward), as_host.receipts)
        team.tokens += tokens_learnt(trainers.get(n, _Earned()).backward, model)
    sums = [
        TeamSum(
            team=name,
            peers=len(team.peers),
            forward_pairs=team.pairs.forward,
            backward_pairs=team.pairs.backward,
            tokens_learnt=team.tokens,
        )
        for name, team in teams.items()
    ]
    return tuple(sorted(sums, key=lambda one: (-one.forward_pairs - one.backward_pairs, -one.tokens_learnt, one.team)))
