"""Which peer gets which (token, expert) pairs: the pure part of dispatch, between the gate and the calls.

It is worked out by numpy, whose calls on small arrays cost a fraction of torch's: one token has few pairs.
Shapes: T tokens, K experts per token, P pairs (those of T x K that name an expert), B blocks of a layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from common.errors import NotHostedError, RefusedError
from node.model.pairs import NO_EXPERT, Pairs
from protocol.manifest import BlockId

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from common.errors import KilohiveError
    from dht.view import Replica
    from node.trainer.dispatch.peers import Peers


@dataclass(frozen=True, kw_only=True)
class SplitLimits:
    """Experts of one block, and the most tokens that one request may carry."""

    experts_per_block: int
    max_tokens: int


@dataclass(frozen=True)
class Part:
    """One request: the pairs that go to `replica`'s peer.

    `blocks` of the layer are those that the pairs touch; `tokens` (int64, sorted, unique) are rows of x_TD; `flat`
    (int64, ascending) are positions in the flattened [T, K] choice; `pairs` count tokens within the part.
    """

    replica: Replica
    blocks: tuple[int, ...]
    tokens: torch.Tensor
    flat: torch.Tensor
    pairs: Pairs


def split_by_peer(
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    flat: torch.Tensor,
    replicas: Mapping[int, Replica],
    limits: SplitLimits,
) -> tuple[list[Part], torch.Tensor]:
    """Parts in the order of peer ids, and the positions in `flat` whose block has no replica.

    A peer gets one part, or several where the limit on tokens asks for it. `replicas` holds the chosen replica of each
    block of this layer that has one.
    """
    peers = sorted({replica.peer_id: replica for replica in replicas.values()}.items())
    index_of = {peer_id: index for index, (peer_id, _) in enumerate(peers)}
    all_P = _Choices.of(expert_ids_TK, weights_TK, flat)
    block_P = all_P.expert_P // limits.experts_per_block
    peer_of_B = np.full(int(block_P.max(initial=-1)) + 1, NO_EXPERT)
    for block, replica in replicas.items():
        if block < len(peer_of_B):
            peer_of_B[block] = index_of[replica.peer_id]
    peer_P = peer_of_B[block_P]
    parts = []
    for index, (_, replica) in enumerate(peers):
        for mine in _by_tokens(np.flatnonzero(peer_P == index), all_P.token_P, limits.max_tokens):
            blocks = tuple(np.flatnonzero(np.bincount(block_P[mine])).tolist())
            parts.append(_part(replica, blocks, all_P.at(mine)))
    return parts, flat[torch.from_numpy(peer_P == NO_EXPERT)]


class _Choices(NamedTuple):
    """The chosen pairs: where each stands in the flattened [T, K] choice, its token, its expert, its weight."""

    flat_P: NDArray[np.int64]
    token_P: NDArray[np.int64]
    expert_P: NDArray[np.int64]
    weight_P: NDArray[np.floating]

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, flat: torch.Tensor) -> _Choices:
        flat_P = flat.numpy()
        expert_P, weight_P = (of_TK.numpy().reshape(-1)[flat_P] for of_TK in (expert_ids_TK, weights_TK))
        return cls(flat_P, flat_P // expert_ids_TK.shape[1], expert_P, weight_P)

    def at(self, pairs: NDArray[np.intp]) -> _Choices:
        return _Choices(self.flat_P[pairs], self.token_P[pairs], self.expert_P[pairs], self.weight_P[pairs])


def _by_tokens(pairs: NDArray[np.intp], token_P: NDArray[np.int64], max_tokens: int) -> Iterator[NDArray[np.intp]]:
    """Split ascending indices of pairs so that each piece touches `max_tokens` tokens at most."""
    if len(pairs) <= max_tokens:
        if len(pairs):
            yield pairs
        return
    firsts = np.flatnonzero(_is_first(token_P[pairs]))
    yield from np.split(pairs, firsts[max_tokens::max_tokens])


def _is_first(token_P: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of ascending tokens is another one than that before it."""
    is_first_P: NDArray[np.bool_] = np.diff(token_P, prepend=-1) != 0
    return is_first_P


def pairs_by_block(expert_ids_TK: torch.Tensor, flat: torch.Tensor, experts_per_block: int) -> dict[int, torch.Tensor]:
    """The positions in `flat` by the block that they name, blocks ascending."""
    block_P = expert_ids_TK.numpy().reshape(-1)[flat.numpy()] // experts_per_block
    blocks = np.flatnonzero(np.bincount(block_P)).tolist()
    return {block: flat[torch.from_numpy(block_P == block)] for block in blocks}


def _part(replica: Replica, blocks: tuple[int, ...], own: _Choices) -> Part:
    # Positions ascend, so their tokens do too: each is sent once, however many of its experts the peer holds.
    is_first_P = _is_first(own.token_P)
    pairs = Pairs(*map(torch.from_numpy, (is_first_P.cumsum() - 1, own.expert_P, own.weight_P)))
    tokens, flat = torch.from_numpy(own.token_P[is_first_P]), torch.from_numpy(own.flat_P)
    return Part(replica=replica, blocks=blocks, tokens=tokens, flat=flat, pairs=pairs)


@dataclass(frozen=True)
class LayerChoice:
    """What the gate chose for the tokens of one layer, on the CPU; -1 is no expert."""

    layer: int
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Planner:
    """Splits pairs over the replicas of their blocks. Both ways through a layer, and every retry, are planned here."""

    def __init__(self, choice: LayerChoice, peers: Peers, limits: SplitLimits) -> None:
        self.choice = choice
        self.failed_peers: set[str] = set()
        self.refusals: set[str] = set()
        self._peers, self._limits = peers, limits
        self._left_out: set[str] = set()
        self._given_up: set[tuple[str, int]] = set()

    def plan(self, flat: torch.Tensor, without: str = "") -> tuple[list[Part], torch.Tensor]:
        """Parts for the pairs at `flat`, none of them at peer `without`; and the pairs that no replica is left for."""
        expert_P = self.choice.expert_ids_TK.numpy().reshape(-1)[flat.numpy()]
        planned: Counter[str] = Counter()
        chosen = {}
        for block, n_pairs in enumerate(np.bincount(expert_P // self._limits.experts_per_block).tolist()):
            replicas = self._candidates(block, without) if n_pairs else []
            if replicas:
                chosen[block] = self._peers.choose(replicas, planned)
                planned[chosen[block].peer_id] += n_pairs
        choice = self.choice
        return split_by_peer(choice.expert_ids_TK, choice.weights_TK, flat, chosen, self._limits)

    def has_others(self, part: Part) -> bool:
        """Whether every block of a part has a replica at another peer."""
        return all(self._candidates(block, part.replica.peer_id) for block in part.blocks)

    def failed(self, part: Part, error: KilohiveError) -> list[torch.Tensor]:
        """Leave out what failed; the part's pairs in the groups in which they are to be planned again."""
        peer_id = part.replica.peer_id
        self._peers.failed(part.replica, [BlockId(self.choice.layer, block) for block in part.blocks], error)
        if isinstance(error, RefusedError):
            self.refusals.add(str(error))
        else:
            self.failed_peers.add(peer_id)
        if not isinstance(error, NotHostedError):
            self._left_out.add(peer_id)
            return [part.flat]
        if len(part.blocks) > 1:
            # It still holds some of them, perhaps as the only one: ask for each alone.
            return list(pairs_by_block(self.choice.expert_ids_TK, part.flat, self._limits.experts_per_block).values())
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
