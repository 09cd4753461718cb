"""Which blocks a host takes and which it gives up: pure functions of what the directory shows, asked again and again.

Needs come in this order: blocks without a replica, blocks with fewer than the run's target (fewest first), then, only
where there is room, the blocks with the longest queues. A host that is full swaps one block at most per check.

Herds. Many hosts see the same need at once. A host leaves a block to others at random, so that of all that could act
about `surge` do for each missing replica; and among equally needy blocks it picks at random. Competitors are counted
in the view: idle hosts (announced, no block yet; so a host announces itself before its first check), and holders that
could make the same swap. Petals' servers, all drawn to the same best place, moved in circles
(github.com/bigscience-workshop/petals/issues/389).

Nothing is lost by moving. Holders of a block are ranked by rendezvous hashing (Thaler and Ravishankar 1998), and one
may drop it only if `keep` holders that it sees serve it rank before it. The first `keep` of all that ever served it
never see so many, so they stay, however old or different the views of all the others are: unless one of them leaves or
crashes, which moving has no part in. `keep` is the target; for a lost block's sake alone it is 1.

Recovery bound. A block whose last server crashes is hidden when its record expires (`dht.record_versions.TTL_S`), seen
as lost with the next refresh (`dht.directory.REFRESH_S`), claimed at the checks that follow: hosts check at random
times `check_s` apart, `surge * target` of them per period on average, all of them where they are fewer, so that two
periods (of 1.25 `check_s` at most) pass without a claim once in e^(2 * surge * target) times. Then comes the transfer.
So

    TTL_S + REFRESH_S + 2 * 1.25 * check_s + transfer

if hosts that place themselves have room for each block, and as much again for each joiner that fails on the way.

Moves bound. Except for lost blocks a host swaps only when all its blocks have stayed `min_stay_s`: at most
3600 / min_stay_s moves per host and hour. For a lost block about `surge * target` hosts in the swarm move, once. Every
other move lowers the number of missing replicas or evens out a load that differed `load_gain` times, so that moves end
when the swarm stops changing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from common.errors import ConfigError
from protocol.manifest import BlockId

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from dht.view import DirectoryView
    from protocol.manifest import ModelConfig

JITTER = 0.25
"""Checks come this much (a share of `check_s`) sooner or later, so that hosts which started together drift apart."""

MIN_CHANCE = 1 / 32
"""However many competing hosts there seem to be: some of them may never act, since their owners fixed their blocks."""

STORED_WEIGHT = 4.0
"""How much likelier a host acts on a block of which it has a checkpoint."""

LAST_RESORT = 8.0
"""How much rarer a host thins a block out for a lost one while others have replicas to spare."""

_RANGE = re.compile(r"(\d{1,9})/(\d{1,9})(?:-(\d{1,9}))?")


class Joiner(NamedTuple):
    """A peer that says it is downloading a block."""

    block: BlockId
    peer_id: str


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """How much a host takes, and how reluctantly it moves.

    `check_s` seconds between checks; `min_stay_s` seconds that every block of a host has stayed before it swaps one;
    `load_gain` times the queue of the block that it drops, and at least `min_load_tokens`, must wait at the block that
    it moves to for load alone; `surge` hosts on average act for each missing replica; after `join_patience_s` seconds
    a peer that still joins no longer counts as a replica; in a run that has trained, a block that nobody has is begun
    anew only `anew_after_s` seconds after this host has looked who is there.
    """

    max_blocks: int
    target_replicas: int
    check_s: float = 10.0
    min_stay_s: float = 300.0
    load_gain: float = 4.0
    min_load_tokens: float = 4096.0
    surge: float = 3.0
    join_patience_s: float = 300.0
    anew_after_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class PlacementView:
    """What placement knows of each block of the run: which peers serve it, serve or join it, and how loaded it is.

    `load_tokens` is the mean queue of the peers that serve a block; `idle_hosts` neither serve nor join anything. What
    the directory says of this host itself may be old and is not looked at.
    """

    own_peer_id: str
    serving: Mapping[BlockId, frozenset[str]]
    holders: Mapping[BlockId, frozenset[str]]
    load_tokens: Mapping[BlockId, float]
    idle_hosts: frozenset[str]

    def supplies(self, own: Collection[BlockId]) -> dict[BlockId, int]:
        """How many other peers serve each block, or will soon; blocks of one's `own` left out."""
        peer_id = self.own_peer_id
        return {block: len(peers) - (peer_id in peers) for block, peers in self.holders.items() if block not in own}

    def competitors(self) -> int:
        """Other hosts that are about to choose their first blocks."""
        return len(self.idle_hosts) - (self.own_peer_id in self.idle_hosts)


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """What to do now: blocks to take, most needed first, and blocks to give up for them."""

    take: tuple[BlockId, ...] = ()
    drop: tuple[BlockId, ...] = ()


def joining_since(view: DirectoryView, before: Mapping[Joiner, float]) -> dict[Joiner, float]:
    """When each joiner in `view` was first seen, `before` being the answer for the previous view."""
    return {joiner: before.get(joiner, view.taken_s) for joiner in _joiners(view)}


def placement_view(view: DirectoryView, own_peer_id: str, ignored: Collection[Joiner] = ()) -> PlacementView:
    """What a host makes of a view of the directory. `ignored` joiners do not count: see `overdue`."""
    serving, load_tokens = {}, {}
    for block, replicas in view.replicas.items():
        serving[block] = frozenset([r.peer_id for r in replicas])
        load_tokens[block] = sum([r.queue_tokens for r in replicas]) / max(len(replicas), 1)
    holders = dict(serving)
    for joiner in _joiners(view):
        if joiner not in ignored:
            holders[joiner.block] = holders.get(joiner.block, frozenset()) | {joiner.peer_id}
    busy = frozenset[str]().union(*holders.values())
    idle = {peer.peer_id for peer in view.peers if peer.role == "host" and not peer.n_blocks and not peer.paused}
    return PlacementView(
        own_peer_id=own_peer_id,
        serving=MappingProxyType(serving),
        holders=MappingProxyType(holders),
        load_tokens=MappingProxyType(load_tokens),
        idle_hosts=frozenset(idle - busy),
    )


def overdue(since: Mapping[Joiner, float], now_s: float, config: PlacementConfig) -> frozenset[Joiner]:
    """Joiners that have taken too long to be counted on, `since` being that of `joining_since`."""
    return frozenset(joiner for joiner, since_s in since.items() if now_s - since_s > config.join_patience_s)


def check_delay_s(config: PlacementConfig, rng: random.Random) -> float:
    """Seconds until a host's next check."""
    return config.check_s * rng.uniform(1 - JITTER, 1 + JITTER)


def plan(
    view: PlacementView,
    own: Mapping[BlockId, float],
    stored: Collection[BlockId],
    config: PlacementConfig,
    rng: random.Random,
) -> PlacementPlan:
    """What a host does at a check.

    Args:
        view: What the directory shows.
        own: Seconds that each block of this host has been there, those that it still joins included.
        stored: Blocks of which this host has a checkpoint; they win ties.
        config: Room and reluctance.
        rng: Randomises, against herds.
    """
    free = config.max_blocks - len(own)
    if free > 0:
        return PlacementPlan(take=tuple(_fill(view, own, stored, config, rng)[:free]))
    swap = _Swap(view, own, config, rng)
    return swap.for_lost(stored) or swap.for_lacking(stored) or swap.for_load() or PlacementPlan()


def may_drop(view: PlacementView, block: BlockId, keep: int) -> bool:
    """Whether `keep` or more replicas are sure to stay when this host drops its own: see the module's docstring."""
    others = view.serving.get(block, frozenset()) - {view.own_peer_id}
    if len(others) < keep:
        return False
    own_rank = _rank(block, view.own_peer_id)
    return sum(_rank(block, peer_id) < own_rank for peer_id in others) >= keep


def parse_blocks(text: str, model: ModelConfig) -> list[BlockId]:
    """`0/0-3,1/7` as block ids; raises ConfigError naming the part that is wrong."""
    blocks: set[BlockId] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--blocks: {part!r} is not LAYER/BLOCK or LAYER/FIRST-LAST, such as 0/0-3")
        layer, first, last = int(match[1]), int(match[2]), int(match[3] or match[2])
        if layer >= model.n_layers or not first <= last < model.blocks_per_layer:
            raise ConfigError(
                f"--blocks: {part!r} is outside this run's {model.n_layers} layers (from 0) "
                f"of {model.blocks_per_layer} blocks (from 0)"
            )
        blocks.update(BlockId(layer, block) for block in range(first, last + 1))
    return sorted(blocks)


class _Swap:
    """The three reasons for which a full host gives up one block for another; None where a reason does not hold."""

    def __init__(
        self, view: PlacementView, own: Mapping[BlockId, float], config: PlacementConfig, rng: random.Random
    ) -> None:
        self._view, self._own, self._config, self._rng = view, own, config, rng
        self._supply = view.supplies(own)
        self._fewest = min(self._supply.values(), default=0)

    def for_lost(self, stored: Collection[BlockId]) -> PlacementPlan | None:
        if self._fewest > 0:
            return None
        lost, target = self._neediest(), self._config.target_replicas
        spare, able = self._spare(target), self._able(target)
        if spare:
            return self._to_any(lost, stored, spare, self._chance(target * len(lost), able))
        chance = self._chance(target * len(lost), self._able(1)) / (LAST_RESORT if able else 1.0)
        return self._to_any(lost, stored, self._spare(1), chance)

    def for_lacking(self, stored: Collection[BlockId]) -> PlacementPlan | None:
        target = self._config.target_replicas
        if not 0 < self._fewest < target or not self._rested():
            return None
        neediest, spare = self._neediest(), self._spare(target)
        if not spare:
            return None
        chance = self._chance((target - self._fewest) * len(neediest), self._able(target))
        return self._to_any(neediest, stored, spare, chance)

    def for_load(self) -> PlacementPlan | None:
        load, config = self._view.load_tokens, self._config
        if self._fewest < config.target_replicas or not self._rested():
            return None
        hot = [block for block in self._supply if load[block] >= config.min_load_tokens]
        drop = min(self._spare(config.target_replicas), key=load.__getitem__, default=None) if hot else None
        if drop is None:
            return None
        worth = [block for block in hot if load[block] >= config.load_gain * load[drop]]
        return self._to_any(worth, (), [drop], self._chance(1, self._able(config.target_replicas)))

    def _neediest(self) -> list[BlockId]:
        return [block for block, n in self._supply.items() if n == self._fewest]

    def _rested(self) -> bool:
        return min(self._own.values(), default=0.0) >= self._config.min_stay_s

    def _spare(self, keep: int) -> list[BlockId]:
        return [block for block in self._own if may_drop(self._view, block, keep)]

    def _able(self, keep: int) -> int:
        """How many hosts have a block to spare, this one included."""
        own_id, able = frozenset([self._view.own_peer_id]), set[str]()
        for block, serving in self._view.serving.items():
            holders = serving | own_id if block in self._own else serving - own_id
            if len(holders) > keep:
                able.update(_ranked(block, holders)[keep:])
        return len(able)

    def _chance(self, lacking: int, able: int) -> float:
        return _chance(lacking, able + self._view.competitors(), self._config)

    def _to_any(
        self, wanted: list[BlockId], stored: Collection[BlockId], spare: list[BlockId], chance: float
    ) -> PlacementPlan | None:
        """One of `spare`, the one with most replicas, for one of `wanted`; or not, if the dice say so."""
        if not wanted or not spare:
            return None
        view, rng = self._view, self._rng
        take = min(wanted, key=lambda block: (block not in stored, rng.random()))
        if rng.random() >= chance * (STORED_WEIGHT if take in stored else 1.0):
            return None
        drop = max(spare, key=lambda block: (len(view.serving[block]), -view.load_tokens[block], rng.random()))
        return PlacementPlan(take=(take,), drop=(drop,))


def _fill(
    view: PlacementView,
    own: Mapping[BlockId, float],
    stored: Collection[BlockId],
    config: PlacementConfig,
    rng: random.Random,
) -> list[BlockId]:
    """Every block that this host lacks, in the order in which it wants them; what is left to competitors is last."""
    supply = view.supplies(own)
    claimed, enough, left = [], [], []
    for block, n in supply.items():
        if n >= config.target_replicas:
            enough.append(block)
        elif block in stored or rng.random() < _chance(config.target_replicas - n, view.competitors() + 1, config):
            claimed.append(block)
        else:
            left.append(block)

    def need(block: BlockId) -> tuple[int, bool, float]:
        return supply[block], block not in stored, rng.random()

    def busy(block: BlockId) -> float:
        """Sorted by this, blocks are drawn by weight without replacement (Efraimidis and Spirakis 2006)."""
        weight = (view.load_tokens[block] + config.min_load_tokens) / (supply[block] + 1)
        return rng.expovariate(weight * (STORED_WEIGHT if block in stored else 1.0))

    return [*sorted(claimed, key=need), *sorted(enough, key=busy), *sorted(left, key=need)]


def _chance(lacking: int, competitors: int, config: PlacementConfig) -> float:
    """Return the chance of acting with which about `surge` of the `competitors` act for each missing replica."""
    return max(MIN_CHANCE, min(1.0, config.surge * lacking / max(competitors, 1)))


def _joiners(view: DirectoryView) -> Iterator[Joiner]:
    return (Joiner(r.block, r.peer_id) for r in view.others if r.state == "joining")


def _ranked(block: BlockId, peer_ids: Iterable[str]) -> list[str]:
    return sorted(peer_ids, key=lambda peer_id: _rank(block, peer_id))


def _rank(block: BlockId, peer_id: str) -> bytes:
    return hashlib.sha256(f"{block}/{peer_id}".encode()).digest()
