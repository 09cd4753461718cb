"""Where one layer's pairs go, with what has failed in this pass left out. Belongs to one compute thread.

Shapes: T tokens, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.dispatch.plan import pairs_by_block, split_by_peer
from protocol.errors import NotHostedError
from protocol.manifest import BlockId

if TYPE_CHECKING:
    import torch

    from dht.view import Replica
    from node.dispatch.peers import Peers
    from node.dispatch.plan import Part
    from protocol.errors import KilohiveError


@dataclass(frozen=True)
class LayerChoice:
    """What the gate chose for the tokens of one layer, on the CPU; -1 is no expert."""

    layer: int
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Planner:
    """Splits pairs over the replicas of their blocks. Both ways through a layer, and every retry, are planned here."""

    def __init__(self, choice: LayerChoice, peers: Peers, experts_per_block: int) -> None:
        self.choice = choice
        self.failed_peers: set[str] = set()
        self._peers, self._experts_per_block = peers, experts_per_block
        self._left_out: set[str] = set()
        self._given_up: set[tuple[str, int]] = set()

    def plan(self, flat: torch.Tensor, without: str = "") -> tuple[list[Part], torch.Tensor]:
        """Parts for the pairs at `flat`, none of them at peer `without`; and the pairs that no replica is left for."""
        by_block = pairs_by_block(self.choice.expert_ids_TK, flat, self._experts_per_block)
        planned: Counter[str] = Counter()
        chosen = {}
        for block, pairs in by_block.items():
            replicas = self._candidates(block, without)
            if replicas:
                chosen[block] = self._peers.choose(replicas, planned)
                planned[chosen[block].peer_id] += len(pairs)
        choice = self.choice
        return split_by_peer(choice.expert_ids_TK, choice.weights_TK, flat, chosen, self._experts_per_block)

    def has_others(self, part: Part) -> bool:
        """Whether every block of a part has a replica at another peer."""
        return all(self._candidates(block, part.replica.peer_id) for block in part.blocks)

    def failed(self, part: Part, error: KilohiveError) -> list[torch.Tensor]:
        """Leave out what failed; the part's pairs in the groups in which they are to be planned again."""
        peer_id = part.replica.peer_id
        self._peers.failed(part.replica, [BlockId(self.choice.layer, block) for block in part.blocks], error)
        self.failed_peers.add(peer_id)
        if not isinstance(error, NotHostedError):
            self._left_out.add(peer_id)
            return [part.flat]
        if len(part.blocks) > 1:
            # It still holds some of them, perhaps as the only one: ask for each alone.
            return list(pairs_by_block(self.choice.expert_ids_TK, part.flat, self._experts_per_block).values())
        self._given_up.add((peer_id, part.blocks[0]))
        return [part.flat]

    def _candidates(self, block: int, without: str) -> list[Replica]:
        return [
            replica
            for replica in self._peers.replicas(BlockId(self.choice.layer, block))
            if replica.peer_id != without
            and replica.peer_id not in self._left_out
            and (replica.peer_id, block) not in self._given_up
        ]
