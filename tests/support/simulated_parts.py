"""What a simulated swarm is made of: a directory with a past, and the weights of all replicas.

Shapes: S slots for replicas (all peers together), R=2 rows of a replica, P=3 numbers in a row.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from dht.directory import REFRESH_S
from dht.view import DirectoryView, PeerInfo, Replica
from node.model.replica_state import ReplicaState
from tests.support.swarm_parts import make_replica

if TYPE_CHECKING:
    from protocol.manifest import BlockId

R, P = 2, 3
LR, BETA1, BETA2, EPS, NOISE = 3e-3, 0.9, 0.95, 1e-8, 1.0
TOKENS = 64.0
HISTORY_S = 3 * REFRESH_S


@dataclass
class SimulatedDirectory:
    """What has been announced, and what it looked like a moment ago."""

    blocks: tuple[BlockId, ...]
    serving: dict[BlockId, dict[str, Replica]] = field(init=False)
    joining: dict[tuple[BlockId, str], Replica] = field(default_factory=dict)
    peers: dict[str, PeerInfo] = field(default_factory=dict)
    _times: list[float] = field(default_factory=list)
    _views: list[DirectoryView] = field(default_factory=list)
    _changed: set[BlockId] = field(init=False)

    def __post_init__(self) -> None:
        self.serving = {block: {} for block in self.blocks}
        self._changed = set(self.blocks)
        self.commit(0.0)

    def announce(self, peer_id: str, block: BlockId, *, joined: bool, queue_tokens: int = 0) -> None:
        replica = replace(make_replica(block, peer_id, "127.0.0.1:1"), queue_tokens=queue_tokens)
        if joined:
            self.joining.pop((block, peer_id), None)
            self.serving[block][peer_id] = replica
        else:
            self.joining[block, peer_id] = replace(replica, state="joining")
        self._changed.add(block)

    def withdraw(self, peer_id: str, block: BlockId) -> None:
        self.serving[block].pop(peer_id, None)
        self.joining.pop((block, peer_id), None)
        self._changed.add(block)

    def tell_peer(self, peer_id: str, n_blocks: int) -> None:
        self.peers[peer_id] = PeerInfo(
            peer_id=peer_id,
            role="host",
            endpoint="127.0.0.1:1",
            software="",
            started_s=0.0,
            n_blocks=n_blocks,
            tokens_per_s=0.0,
            run_tokens=0,
            queue_tokens=0,
            expiration_s=2e9,
        )
        self._changed.add(self.blocks[0])

    def commit(self, now_s: float) -> None:
        """Make what changed visible from `now_s` on."""
        if not self._changed:
            return
        replicas = dict(self._views[-1].replicas) if self._views else {}
        replicas |= {block: tuple(self.serving[block].values()) for block in self.blocks if block in self._changed}
        self._changed.clear()
        view = DirectoryView(
            taken_s=now_s,
            replicas=MappingProxyType(replicas),
            others=tuple(self.joining.values()),
            peers=tuple(self.peers.values()),
        )
        self._times.append(now_s)
        self._views.append(view)
        old = bisect_right(self._times, now_s - HISTORY_S) - 1
        if old > 0:
            del self._times[:old], self._views[:old]

    def as_of(self, seen_s: float) -> DirectoryView:
        return self._views[max(bisect_right(self._times, seen_s) - 1, 0)]


class SimulatedWeights:
    """All replicas in few tensors, so that a step of the whole swarm is a few operations; one slot per replica."""

    def __init__(self, n_slots: int, blocks: tuple[BlockId, ...], seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.params_SRP, self.first_SRP, self.second_SRP = (torch.zeros(n_slots, R, P) for _ in range(3))
        self.steps_SR = torch.zeros(n_slots, R, dtype=torch.int64)
        self.learnt_SR = torch.zeros(n_slots, R, dtype=torch.float64)
        self._serves_S11 = torch.zeros(n_slots, 1, 1)
        self._goal_SRP = torch.zeros(n_slots, R, P)
        self._start = {block: torch.randn(R, P, generator=self._generator) for block in blocks}
        self._goal = {block: 3 * torch.randn(R, P, generator=self._generator) for block in blocks}
        self._free = list(range(n_slots))

    def take(self, block: BlockId, state: ReplicaState | None) -> int:
        """A slot with a copy of `state`, or as the run's seed has the block."""
        slot = self._free.pop()
        self._serves_S11[slot] = 1.0
        self._goal_SRP[slot] = self._goal[block]
        self.params_SRP[slot] = self._start[block] if state is None else state.params["w"]
        self.first_SRP[slot] = 0.0 if state is None else state.first["w"]
        self.second_SRP[slot] = 0.0 if state is None else state.second["w"]
        self.steps_SR[slot] = 0 if state is None else state.steps_R
        self.learnt_SR[slot] = 0.0
        return slot

    def give_back(self, slot: int) -> None:
        self._serves_S11[slot] = 0.0
        self._free.append(slot)

    def state(self, slot: int) -> ReplicaState:
        """The live tensors of a slot."""
        return ReplicaState(
            params={"w": self.params_SRP[slot]},
            first={"w": self.first_SRP[slot]},
            second={"w": self.second_SRP[slot]},
            steps_R=self.steps_SR[slot],
            learnt_R=self.learnt_SR[slot],
            version=self.version(slot),
        )

    def version(self, slot: int) -> int:
        return int(self.steps_SR[slot].max())

    def train(self) -> None:
        """One Adam step of every replica towards its block's goal, by a gradient that is mostly noise."""
        noise_SRP = torch.randn(self.params_SRP.shape, generator=self._generator)
        grad_SRP = (self.params_SRP - self._goal_SRP).add_(noise_SRP, alpha=NOISE).clamp_(-1, 1)
        serves_S11 = self._serves_S11
        self.first_SRP.lerp_(grad_SRP, (1 - BETA1) * serves_S11)
        self.second_SRP.lerp_(grad_SRP.square_(), (1 - BETA2) * serves_S11)
        self.params_SRP.sub_(serves_S11 * self.first_SRP / (self.second_SRP.sqrt() + EPS), alpha=LR)
        self.steps_SR += serves_S11[:, :, 0].long()
        self.learnt_SR.add_(serves_S11[:, :, 0], alpha=TOKENS)
