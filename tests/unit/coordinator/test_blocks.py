"""Which host of a local swarm gets which blocks, and how blocks are written."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import ConfigError
from coordinator.blocks import block_list_text, split_blocks
from protocol.manifest import BlockId, ModelConfig, all_blocks


@given(
    layers=st.integers(1, 4),
    experts_per_layer=st.integers(1, 200),
    experts_per_block=st.integers(1, 40),
    n_hosts=st.integers(1, 12),
    n_replicas=st.integers(1, 5),
)
def test_every_block_has_its_replicas_and_hosts_share_evenly(
    layers: int, experts_per_layer: int, experts_per_block: int, n_hosts: int, n_replicas: int
) -> None:
    model = ModelConfig(n_layers=layers, experts_per_layer=experts_per_layer, experts_per_block=experts_per_block)
    blocks = all_blocks(model)
    if n_replicas > n_hosts or n_hosts > len(blocks) * n_replicas:
        with pytest.raises(ConfigError, match="there are only"):
            split_blocks(model, n_hosts, n_replicas)
        return
    shares = split_blocks(model, n_hosts, n_replicas)
    assert Counter(block for share in shares for block in share) == dict.fromkeys(blocks, n_replicas)
    assert all(len(set(share)) == len(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for layer in range(layers):
        counts = [sum(block.layer == layer for block in share) for share in shares]
        assert max(counts) - min(counts) <= 1


@given(n_hosts=st.integers(1, 24), n_replicas=st.integers(1, 4), blocks_per_layer=st.integers(24, 200))
def test_few_pairs_of_hosts_share_blocks_and_those_share_many(
    n_hosts: int, n_replicas: int, blocks_per_layer: int
) -> None:
    model = ModelConfig(experts_per_layer=blocks_per_layer, experts_per_block=1)
    assume(n_replicas <= n_hosts)
    shares = list(map(frozenset, split_blocks(model, n_hosts, n_replicas)))
    partners = [sum(bool(share & other) for other in shares) - 1 for share in shares]
    if n_hosts % n_replicas == 0:
        assert set(partners) == {n_replicas - 1}
        assert len(set(shares)) == n_hosts // n_replicas
    assert max(partners) <= 3 * (n_replicas - 1)


def test_blocks_are_written_as_ranges() -> None:
    blocks = [BlockId(0, 0), BlockId(0, 1), BlockId(0, 2), BlockId(0, 5), BlockId(1, 3), BlockId(2, 4), BlockId(2, 5)]
    assert block_list_text(blocks) == "0/0-2,0/5,1/3,2/4-5"
    assert block_list_text([]) == ""
