"""A swarm in memory: no sockets, no sleep, a clock that is a number. Placement and gossip are the product's own.

Peers look at the directory as it was at their last refresh; what a crashed peer said stays there until it expires.
Every step is one second: replicas that serve take a noisy Adam step, then whatever is due happens. Seeded: the same
configuration makes the same history.

Shapes: R=2 rows of a replica.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from dht.directory import REFRESH_S
from dht.record_versions import PERIOD_S, TTL_S
from node.averaging.gossip import GossipLimits, Move, apply_move, checked_moments, relative_distance, share_R
from node.averaging.partners import History, candidates, choose_partner
from node.host.placement import (
    JITTER,
    Joiner,
    PlacementConfig,
    PlacementView,
    check_delay_s,
    joining_since,
    overdue,
    placement_view,
    plan,
)
from protocol.manifest import BlockId
from tests.support.simulated_parts import HISTORY_S, R, SimulatedDirectory, SimulatedWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from dht.view import DirectoryView
    from node.model.replica_state import ReplicaState

LOAD_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """A swarm and its weather; mean seconds between events, 0 for never.

    One peer crashes or leaves every `churn_s`; everyone who serves some block crashes at once every `wipe_s`. Whoever
    goes is replaced within `return_s`, one in three times by itself with its checkpoints. `failing_joiners` of those
    who join crash or leave in the middle. A block's transfer takes from 3 to `transfer_s` seconds.
    """

    seed: int = 0
    n_peers: int = 64
    n_blocks: int = 60
    capacity: tuple[int, int] = (1, 4)
    target_replicas: int = 2
    churn_s: float = 60.0
    wipe_s: float = 400.0
    return_s: float = 60.0
    failing_joiners: float = 0.1
    transfer_s: float = 12.0
    exchange_s: float = 160.0
    hot_blocks: int = 0

    def calm(self) -> SimulationConfig:
        """The same swarm, from which nobody ever goes, and which hardly gossips."""
        return replace(self, churn_s=0.0, wipe_s=0.0, failing_joiners=0.0, exchange_s=10_000.0)

    def recovery_bound_s(self) -> float:
        """As the docstring of `node.host.placement` has it, and a step for rounding each of the four."""
        checks_s = 2 * (1 + JITTER) * PlacementConfig(max_blocks=1, target_replicas=1).check_s
        return TTL_S + REFRESH_S + checks_s + self.transfer_s + 4.0


@dataclass
class SimulatedPeer:
    """A host: blocks it has or joins (since when), slots of those it serves, checkpoints. Gossip has its own dice."""

    peer_id: str
    config: PlacementConfig
    rng: random.Random
    gossip_rng: random.Random
    phase_s: float
    history: History
    own: dict[BlockId, float] = field(default_factory=dict)
    slots: dict[BlockId, int] = field(default_factory=dict)
    stored: dict[BlockId, ReplicaState] = field(default_factory=dict)
    since: dict[Joiner, float] = field(default_factory=dict)
    marks: defaultdict[tuple[BlockId, str], torch.Tensor] = field(
        default_factory=lambda: defaultdict(lambda: torch.zeros(R, dtype=torch.float64))
    )
    alive: bool = True


@dataclass(frozen=True)
class Outage:
    """A block that nobody served, and how many that had begun to join it failed meanwhile."""

    block: BlockId
    start_s: float
    end_s: float
    failed_joiners: int


@dataclass(frozen=True)
class Moved:
    """A full host's swap; `lost` if nobody served or joined what it took."""

    time_s: float
    peer_id: str
    take: BlockId
    drop: BlockId
    lost: bool
    left: int


class Simulation:
    """Runs the swarm and keeps the books: `outages`, `moves`, `exchanges`."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.now_s = 0.0
        self.training = True
        self.churning = True
        self.blocks = tuple(BlockId(0, index) for index in range(config.n_blocks))
        self.directory = SimulatedDirectory(self.blocks)
        self.peers: dict[str, SimulatedPeer] = {}
        self.moves: list[Moved] = []
        self.outages: list[Outage] = []
        self.exchanges = 0
        self.weather: Counter[str] = Counter()
        # Twice the room of all: whoever comes back early overlaps with nobody who has not gone.
        self.weights = SimulatedWeights(2 * config.n_peers * config.capacity[1], self.blocks, config.seed)
        self._rng = random.Random(config.seed)
        self._views: dict[float, PlacementView] = {}
        self._limits = GossipLimits(clip_radius=0.5, max_second=1.0, first_bound=10.0)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._names = itertools.count()
        self._down: dict[BlockId, float] = dict.fromkeys(self.blocks, 0.0)
        self._failed: Counter[BlockId] = Counter()
        self.hot = frozenset(self._rng.sample(self.blocks, config.hot_blocks))
        self._every(config.churn_s, self._one_goes)
        self._every(config.wipe_s, self._holders_crash)
        self._after(LOAD_S, self._tell_load)

    def run(self, steps: int) -> None:
        """Let `steps` seconds pass."""
        for _ in range(steps):
            self.now_s += 1.0
            if self.training:
                self.weights.train()
            while self._due and self._due[0][0] <= self.now_s:
                heapq.heappop(self._due)[2]()
            self.directory.commit(self.now_s)

    def join(
        self, stored: dict[BlockId, ReplicaState] | None = None, peer_id: str = "", capacity: int = 0
    ) -> SimulatedPeer:
        """A host starts: it announces itself, reads the directory, then checks."""
        config, rng = self.config, self._rng
        peer = SimulatedPeer(
            peer_id or f"peer-{next(self._names)}",
            PlacementConfig(
                max_blocks=capacity or rng.randint(*config.capacity), target_replicas=config.target_replicas
            ),
            random.Random(rng.random()),
            random.Random(rng.random()),
            phase_s=rng.uniform(0, REFRESH_S),
            history=History(self.now_s),
            stored=stored or {},
        )
        self.peers[peer.peer_id] = peer
        self.directory.tell_peer(peer.peer_id, 0)
        self._after(1.5 * REFRESH_S, lambda: self._check(peer))
        self._after(rng.uniform(0, config.exchange_s), lambda: self._exchange(peer))
        if rng.random() < config.failing_joiners:
            self._after(1.5 * REFRESH_S + 2.0, lambda: self._go(peer, crash=rng.random() < 0.5))
        return peer

    def go(self, peer: SimulatedPeer, *, crash: bool) -> None:
        """A host leaves, or crashes: then its records stay until they expire."""
        peer.alive = False
        del self.peers[peer.peer_id]
        for block in tuple(peer.own):
            if block in peer.slots:
                peer.stored[block] = self.weights.state(peer.slots[block]).copy()
            else:
                self._failed[block] += 1
            self._stop_serving(peer, block)
        said_s = self._rng.uniform(0, PERIOD_S)  # seconds ago

        def forget() -> None:
            again = self.peers.get(peer.peer_id)
            if again is None:
                self.directory.peers.pop(peer.peer_id, None)
            for block in self.blocks:
                if again is None or block not in again.own:
                    self.directory.withdraw(peer.peer_id, block)

        if crash:
            self._after(TTL_S - said_s, forget)
        else:
            forget()

    def holders(self, block: BlockId) -> list[SimulatedPeer]:
        """Peers that serve the block, in truth."""
        return [peer for peer in self.peers.values() if block in peer.slots]

    def open_outages(self) -> list[Outage]:
        """Of blocks that nobody serves now."""
        return [Outage(block, start_s, self.now_s, self._failed[block]) for block, start_s in self._down.items()]

    def divergence(self) -> float:
        """Relative distance of replicas from their block's mean, the mean over all blocks with two or more."""
        distances = []
        for block in self.blocks:
            slots = [peer.slots[block] for peer in self.holders(block)]
            if len(slots) > 1:
                replicas_NRP = self.weights.params_SRP[slots]
                mean_RP = replicas_NRP.mean(0)
                distances += [relative_distance({"w": w - mean_RP}, {"w": mean_RP}) for w in replicas_NRP]
        return sum(distances) / max(len(distances), 1)

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._order), action))

    def _every(self, mean_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            if self.churning:
                action()
            self._every(mean_s, action)

        if mean_s:
            self._after(self._rng.expovariate(1 / mean_s), act)

    def _seen_by(self, peer: SimulatedPeer) -> DirectoryView:
        refreshed_s = self.now_s - (self.now_s - peer.phase_s) % REFRESH_S
        return self.directory.as_of(refreshed_s)

    def _check(self, peer: SimulatedPeer) -> None:
        """What a host does every `check_s`."""
        if not peer.alive:
            return
        seen = self._seen_by(peer)
        peer.since = joining_since(seen, peer.since)
        view = self._placement_view(seen, peer, overdue(peer.since, self.now_s, peer.config))
        ages_s = {block: self.now_s - since_s for block, since_s in peer.own.items()}
        planned = plan(view, ages_s, peer.stored, peer.config, peer.rng)
        for block in planned.drop:
            if block in peer.slots:
                peer.stored[block] = self.weights.state(peer.slots[block]).copy()
            self._stop_serving(peer, block)
            self.directory.withdraw(peer.peer_id, block)
            take, left = planned.take[0], len(self.holders(block))
            self.moves.append(Moved(self.now_s, peer.peer_id, take, block, not view.supplies(())[take], left))
        for block in planned.take:
            self._start_joining(peer, block)
        self._after(check_delay_s(peer.config, peer.rng), lambda: self._check(peer))

    def _placement_view(self, seen: DirectoryView, peer: SimulatedPeer, ignored: frozenset[Joiner]) -> PlacementView:
        """But for whose it is, it is the same for everybody who sees the same: worth remembering."""
        if ignored:
            return placement_view(seen, peer.peer_id, ignored)
        if seen.taken_s not in self._views:
            self._views = {time_s: view for time_s, view in self._views.items() if time_s > seen.taken_s - HISTORY_S}
            self._views[seen.taken_s] = placement_view(seen, peer.peer_id)
        return replace(self._views[seen.taken_s], own_peer_id=peer.peer_id)

    def _start_joining(self, peer: SimulatedPeer, block: BlockId) -> None:
        peer.own[block] = self.now_s
        self.directory.announce(peer.peer_id, block, joined=False)
        self.directory.tell_peer(peer.peer_id, len(peer.own))
        self._after(peer.rng.uniform(3.0, self.config.transfer_s), lambda: self._serve(peer, block))

    def _serve(self, peer: SimulatedPeer, block: BlockId) -> None:
        """The download is complete: from who serves the block, else from a checkpoint of one's own, else the seed."""
        if not peer.alive or block not in peer.own or block in peer.slots:
            return
        source = next(iter(self.holders(block)), None)
        state = self.weights.state(source.slots[block]) if source else peer.stored.get(block)
        peer.slots[block] = self.weights.take(block, state)
        self.directory.announce(peer.peer_id, block, joined=True)
        start_s = self._down.pop(block, None)
        if start_s is not None:
            self.outages.append(Outage(block, start_s, self.now_s, self._failed.pop(block, 0)))

    def _stop_serving(self, peer: SimulatedPeer, block: BlockId) -> None:
        del peer.own[block]
        slot = peer.slots.pop(block, None)
        if slot is None:
            return
        self.weights.give_back(slot)
        if not self.holders(block):
            self._down[block] = self.now_s
            self._failed.pop(block, None)

    def _exchange(self, peer: SimulatedPeer) -> None:
        """A pair of live replicas of one block meets; whoever has gone does not answer."""
        if not peer.alive:
            return
        self._after(self.config.exchange_s * peer.gossip_rng.uniform(0.5, 1.5), lambda: self._exchange(peer))
        versions = {block: self.weights.version(slot) for block, slot in peer.slots.items()}
        seen = self._seen_by(peer)
        found = candidates(versions, seen.replicas.__getitem__, peer.peer_id, peer.history, self.now_s)
        if not found:
            return
        chosen = choose_partner(found, peer.gossip_rng)
        partner, block = self.peers.get(chosen.peer_id), chosen.blocks[0]
        if partner is None or block not in partner.slots:
            peer.history.failed(chosen.peer_id, self.now_s)
            return
        peer.history.answered(chosen.peer_id, 0.1)
        self._average(block, peer, partner)

    def _average(self, block: BlockId, a: SimulatedPeer, b: SimulatedPeer) -> None:
        live = [self.weights.state(peer.slots[block]) for peer in (a, b)]
        seen = [state.copy() for state in live]
        works = [
            (state.learnt_R - peer.marks[block, other.peer_id]).clamp_(min=0)
            for state, peer, other in zip(seen, (a, b), (b, a), strict=True)
        ]
        for own, other, state in ((0, 1, live[0]), (1, 0, live[1])):
            partner = seen[other].copy()
            checked_moments(partner.first, partner.second, self._limits)
            move = Move(
                delta={"w": partner.params["w"] - seen[own].params["w"]},
                alpha_R=share_R(works[own], works[other]),
                first=partner.first,
                second=partner.second,
                steps_R=partner.steps_R,
                version=partner.version,
            )
            apply_move(state, move, self._limits)
        a.marks[block, b.peer_id], b.marks[block, a.peer_id] = seen[0].learnt_R, seen[1].learnt_R
        a.history.met(block, b.peer_id, self.now_s)
        b.history.met(block, a.peer_id, self.now_s)
        self.exchanges += 1

    def _tell_load(self) -> None:
        """Every replica's queue: hot blocks have much to do, shared by those who serve them; readings are noisy."""
        for peer in self.peers.values():
            waiting = sum(40_000 / len(self.directory.serving[b]) for b in peer.slots if b in self.hot)
            for block in peer.slots:
                tokens = int((waiting + 2000) * peer.rng.uniform(0.5, 1.5))
                self.directory.announce(peer.peer_id, block, joined=True, queue_tokens=tokens)
        self._after(LOAD_S, self._tell_load)

    def _one_goes(self) -> None:
        self._go(self._rng.choice(list(self.peers.values())), crash=self._rng.random() < 0.5)

    def _holders_crash(self) -> None:
        for peer in self.holders(self._rng.choice(self.blocks)):
            self._go(peer, crash=True)
        self.weather["wipes"] += 1

    def _go(self, peer: SimulatedPeer, *, crash: bool) -> None:
        """Churn: a peer goes, and later it or another comes."""
        if not peer.alive or not self.churning:
            return
        self.weather["crashes" if crash else "leaves"] += 1
        self.go(peer, crash=crash)
        again = self._rng.random() < 1 / 3

        def come() -> None:
            self.join(peer.stored, peer.peer_id) if again else self.join()

        self._after(self._rng.uniform(5.0, self.config.return_s), come)
