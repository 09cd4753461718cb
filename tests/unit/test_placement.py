from __future__ import annotations

import pytest

from node.placement import choose_blocks, parse_blocks
from protocol.errors import ConfigError
from protocol.manifest import BlockId, all_blocks
from tests.support.swarm_parts import small_manifest

MODEL = small_manifest().model


def test_blocks_are_named_by_layer_and_range() -> None:
    assert parse_blocks("0/0-2, 1/3,0/1", MODEL) == [BlockId(0, 0), BlockId(0, 1), BlockId(0, 2), BlockId(1, 3)]


@pytest.mark.parametrize("text", ["", "0", "0/", "a/1", "0/1-", "0/3-1", "2/0", "0/4", "0/0-4", "0/0;1/1", "-1/0"])
def test_a_wrong_name_is_a_usage_error_that_quotes_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--blocks: "):
        parse_blocks(text, MODEL)


def test_blocks_without_a_replica_come_first() -> None:
    replicas = dict.fromkeys(all_blocks(MODEL), 1)
    del replicas[BlockId(1, 2)]
    replicas[BlockId(0, 0)] = 0
    assert choose_blocks(MODEL, replicas, "peer", 2) == [BlockId(0, 0), BlockId(1, 2)]


def test_a_host_takes_the_blocks_that_it_has_checkpoints_of() -> None:
    assert choose_blocks(MODEL, {}, "peer", 1, own={BlockId(1, 1)}) == [BlockId(1, 1)]


def test_hosts_that_start_together_on_an_empty_swarm_spread_out() -> None:
    chosen = {block for peer in range(12) for block in choose_blocks(MODEL, {}, f"peer{peer}", 2)}
    assert len(chosen) >= len(all_blocks(MODEL)) - 1
    assert choose_blocks(MODEL, {}, "peer0", 100) == all_blocks(MODEL)
