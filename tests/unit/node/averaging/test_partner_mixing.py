"""Whom peers choose when most of them are busy most of the time: everyone mixes soon, then everyone is quiet."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from dht.view import Replica
from node.averaging.averager import pause_s
from node.averaging.exchange import BlockResult
from node.averaging.partners import QUIET_S, History, candidates, choose_partner
from node.averaging.replica_set import ReplicaSet
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.averaging.partners import Candidate

BLOCK = BlockId(0, 0)
PERIOD_S = 0.5
EXCHANGE_S = 0.3
LOST = 0.004
"""Of a difference, by an 8-bit codec."""

MIXED = 1e-3


@dataclass
class Peer:
    peer_id: str
    weights: list[float]
    rng: random.Random
    version: int = 0
    in_exchange: bool = False
    history: History = field(default_factory=lambda: History(0.0))
    replicas: ReplicaSet = field(default_factory=ReplicaSet)

    def distance(self, other: Peer) -> float:
        return math.dist(self.weights, other.weights) / math.hypot(*self.weights)


class Swarm:
    """Peers of one block that dial each other, each in one exchange at a time; whoever is in one already is busy."""

    def __init__(self, n_peers: int, seed: int) -> None:
        self.now_s = 0.0
        self.divergences: list[float] = []
        self._number = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.peers: dict[str, Peer] = {}
        for n in range(n_peers):
            one_hot = [float(n == i) for i in range(n_peers)]
            peer = Peer(f"p{n}", one_hot, random.Random(f"{seed}/{n}"))
            self.peers[peer.peer_id] = peer
            self._next(peer, pause_s(PERIOD_S, 0.0, peer.rng))

    def spread(self) -> float:
        return max(a.distance(b) for a, b in itertools.permutations(self.peers.values(), 2))

    def run_until(self, end_s: float) -> None:
        while self._due[0][0] <= end_s:
            self.now_s, _, act = heapq.heappop(self._due)
            act()
        self.now_s = end_s

    def candidates_of(self, peer: Peer) -> list[str]:
        return [c.peer_id for c in self._found(peer)]

    def _found(self, peer: Peer) -> tuple[Candidate, ...]:
        return candidates({BLOCK: peer.version}, self._holders, peer.peer_id, peer.history, self.now_s)

    def _holders(self, block: BlockId) -> list[Replica]:
        return [
            Replica(
                block=block,
                peer_id=peer.peer_id,
                endpoint="",
                version=peer.version,
                queue_tokens=0,
                tokens_per_s=0.0,
                tokens_total=0,
                n_experts=1,
                expiration_s=1e9,
            )
            for peer in self.peers.values()
        ]

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_s + seconds, next(self._number), act))

    def _turn(self, peer: Peer) -> None:
        found = self._found(peer)
        partner = self.peers[choose_partner(found, peer.rng).peer_id] if found else None
        if partner and not peer.in_exchange and not partner.in_exchange:
            peer.in_exchange = partner.in_exchange = True
            self._after(EXCHANGE_S, lambda: self._end(peer, partner))
            return
        if partner:
            peer.history.busy(partner.peer_id, self.now_s, 0.2 * peer.rng.uniform(1, 2))
        self._next(peer, min(pause_s(PERIOD_S, 0.0, peer.rng), peer.history.busy_for_s(self.now_s)))

    def _end(self, a: Peer, b: Peer) -> None:
        both = ((a, b, a.distance(b)), (b, a, b.distance(a)))
        self.divergences.append(a.distance(b))
        pairs = list(zip(a.weights, b.weights, strict=True))
        a.weights = [(x + y) / 2 + LOST / 2 * (x - y) for x, y in pairs]
        b.weights = [(x + y) / 2 - LOST / 2 * (x - y) for x, y in pairs]
        a.version = b.version = max(a.version, b.version)
        for own, other, divergence in both:
            result = BlockResult(
                block=BLOCK,
                divergence=divergence,
                clipped_rows=0,
                version_gap=0,
                version=own.version,
                partner_share=0.5,
                moved=own.replicas.moved(BLOCK, divergence),
            )
            own.history.met(BLOCK, other.peer_id, self.now_s, result)
            own.in_exchange = False
        a.history.answered(b.peer_id, EXCHANGE_S)
        self._next(a, pause_s(PERIOD_S, EXCHANGE_S, a.rng))

    def _next(self, peer: Peer, seconds: float) -> None:
        self._after(seconds, lambda: self._turn(peer))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_peers", "n_periods"), [(2, 5), (4, 15), (8, 40)])
def test_peers_that_are_often_busy_mix_within_so_many_periods_and_then_are_quiet(
    n_peers: int, n_periods: int, seed: int
) -> None:
    swarm = Swarm(n_peers, seed)
    swarm.run_until(n_periods * PERIOD_S)
    assert swarm.spread() < MIXED
    swarm.run_until(QUIET_S - 10.0)
    assert [swarm.candidates_of(peer) for peer in swarm.peers.values()] == [[]] * n_peers
    # A pair needs two exchanges for what the codec loses, and one in each direction may find that nothing is left.
    assert len(swarm.divergences) < 5 * n_peers * (n_peers - 1) / 2
    assert swarm.spread() < MIXED


def test_what_one_of_them_learns_later_reaches_all() -> None:
    swarm = Swarm(4, 0)
    swarm.run_until(QUIET_S - 10.0)
    learner = swarm.peers["p2"]
    learner.weights[0] += 1.0
    learner.version += 1
    swarm.run_until(QUIET_S)
    assert swarm.spread() < MIXED
    assert min(peer.weights[0] for peer in swarm.peers.values()) > 0.25 + 0.1
