from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from node.model.pairs import flat_pairs
from node.trainer.dispatch.plan import SplitLimits, pairs_by_block, split_by_peer
from protocol.manifest import BlockId
from tests.support.swarm_parts import make_replica


@given(
    n_tokens=st.integers(0, 12),
    width=st.integers(1, 4),
    owners=st.lists(st.sampled_from(["", "p0", "p1", "p2"]), min_size=4, max_size=4),
    max_tokens=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_every_pair_goes_to_one_peer_that_holds_it_or_is_an_orphan(
    n_tokens: int, width: int, owners: list[str], max_tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, 16, (n_tokens, width), generator=generator)
    weights_TK = torch.rand(n_tokens, width, generator=generator)
    replicas = {b: make_replica(BlockId(0, b), owner, "h:1") for b, owner in enumerate(owners) if owner}
    flat = flat_pairs(ids_TK)
    limits = SplitLimits(experts_per_block=4, max_tokens=max_tokens)
    parts, orphans = split_by_peer(ids_TK, weights_TK, flat, replicas, limits)

    seen = torch.cat([orphans, *(part.flat for part in parts)]).sort().values
    assert torch.equal(seen, flat)
    assert all(owners[int(ids_TK.reshape(-1)[p]) // 4] == "" for p in orphans)
    assert [part.replica.peer_id for part in parts] == sorted(part.replica.peer_id for part in parts)
    for peer_id in {part.replica.peer_id for part in parts}:
        sizes = [len(part.tokens) for part in parts if part.replica.peer_id == peer_id]
        assert all(size == max_tokens for size in sizes[:-1]), "no more calls than needed"
        assert 0 < sizes[-1] <= max_tokens
    for part in parts:
        expert_P = ids_TK.reshape(-1)[part.flat]
        assert all(owners[int(e) // 4] == part.replica.peer_id for e in expert_P)
        assert part.blocks == tuple(sorted({int(e) // 4 for e in expert_P}))
        assert torch.equal(part.pairs.expert_P, expert_P)
        assert torch.equal(part.tokens[part.pairs.token_P], part.flat // width)
        assert torch.equal(part.pairs.weight_P, weights_TK.reshape(-1)[part.flat])
        assert len(torch.unique(part.tokens)) == len(part.tokens)


def test_pairs_by_block_keep_their_order_and_leave_out_blocks_that_nobody_chose() -> None:
    ids_TK = torch.tensor([[0, 9], [3, -1], [8, 1]])
    by_block = pairs_by_block(ids_TK, flat_pairs(ids_TK), 4)
    assert {block: flat.tolist() for block, flat in by_block.items()} == {0: [0, 2, 5], 2: [1, 4]}
