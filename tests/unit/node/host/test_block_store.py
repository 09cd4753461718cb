from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from node.host.block_store import BlockStore, block_path
from node.model.experts.block import new_block
from protocol.manifest import BlockId, Manifest, ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
MANIFEST = Manifest(name="store", model=ModelConfig(d_model=8, experts_per_layer=8, experts_per_block=4))
BLOCK = BlockId(1, 1)


def store_with_versions(tmp_path: Path, *versions: int) -> BlockStore:
    store = BlockStore(tmp_path, MANIFEST, CPU)
    block = new_block(MANIFEST, BLOCK, CPU)
    for block.version in versions:
        store.write(BLOCK, *store.copy(block))
    return store


def test_a_host_killed_between_the_two_renames_finds_its_block_again(tmp_path: Path) -> None:
    store = store_with_versions(tmp_path, 3, 7)
    block_path(tmp_path, BLOCK).unlink()

    assert store.versions() == {BLOCK: 3}
    block = store.load(BLOCK)
    assert block is not None
    assert block.version == 3


def test_the_newest_checkpoint_of_a_block_counts_once(tmp_path: Path) -> None:
    assert store_with_versions(tmp_path, 3, 7).versions() == {BLOCK: 7}


def test_a_lone_previous_checkpoint_is_trimmed_like_any_other(tmp_path: Path) -> None:
    store = store_with_versions(tmp_path, 3, 7)
    block_path(tmp_path, BLOCK).unlink()

    assert store.trim(0, kept=()) == [BLOCK]
    assert not list(tmp_path.rglob("*.safetensors"))
