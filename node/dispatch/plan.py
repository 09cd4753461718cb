"""Which peer gets which (token, expert) pairs: the pure part of dispatch, between the gate and the calls.

Shapes: T tokens, K experts per token, P pairs (those of T x K that name an expert), B blocks of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from node.experts.layer import Pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dht.view import Replica

NO_EXPERT = -1


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


@dataclass(frozen=True)
class Combined:
    """`combined_TD` sums what answered, `answered_TK` says which choices that were; `ticket` is for the backward."""

    combined_TD: torch.Tensor
    answered_TK: torch.Tensor
    ticket: Any


def flat_pairs(expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """Positions (int64, ascending) in the flattened [T, K] choice that name an expert."""
    return torch.nonzero(expert_ids_TK.reshape(-1) != NO_EXPERT)[:, 0]


def split_by_peer(
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    flat: torch.Tensor,
    replicas: Mapping[int, Replica],
    experts_per_block: int,
) -> tuple[list[Part], torch.Tensor]:
    """Parts, one per peer in the order of peer ids, and the positions in `flat` whose block has no replica.

    `replicas` holds the chosen replica of each block of this layer that has one.
    """
    peers = sorted({replica.peer_id: replica for replica in replicas.values()}.items())
    index_of = {peer_id: index for index, (peer_id, _) in enumerate(peers)}
    expert_P = expert_ids_TK.reshape(-1)[flat]
    n_blocks = int(expert_P.max()) // experts_per_block + 1 if len(flat) else 0
    peer_of_B = torch.full((n_blocks,), NO_EXPERT)
    for block, replica in replicas.items():
        if block < n_blocks:
            peer_of_B[block] = index_of[replica.peer_id]
    peer_P = peer_of_B[expert_P // experts_per_block] if len(flat) else flat
    parts = []
    for index, (_, replica) in enumerate(peers):
        mine = torch.nonzero(peer_P == index)[:, 0]
        if len(mine):
            blocks = tuple(torch.unique(expert_P[mine] // experts_per_block).tolist())
            parts.append(_part(replica, blocks, flat[mine], expert_P[mine], weights_TK))
    return parts, flat[peer_P == NO_EXPERT]


def pairs_by_block(expert_ids_TK: torch.Tensor, flat: torch.Tensor, experts_per_block: int) -> dict[int, torch.Tensor]:
    """The positions in `flat` by the block that they name, blocks ascending."""
    block_P = expert_ids_TK.reshape(-1)[flat] // experts_per_block
    return {block: flat[block_P == block] for block in torch.unique(block_P).tolist()}


def _part(
    replica: Replica, blocks: tuple[int, ...], flat: torch.Tensor, expert_P: torch.Tensor, weights_TK: torch.Tensor
) -> Part:
    # `flat` ascends, so its tokens do too: each is sent once, however many of its experts the peer holds.
    tokens, token_P = torch.unique_consecutive(flat // weights_TK.shape[1], return_inverse=True)
    weight_P = weights_TK.reshape(-1)[flat]
    return Part(replica=replica, blocks=blocks, tokens=tokens, flat=flat, pairs=Pairs(token_P, expert_P, weight_P))
