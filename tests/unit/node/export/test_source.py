"""Where an export takes the parts of a model from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import CheckpointError
from node.export.source import Checkpoint, PartSource
from node.trainer.exported.layout import parts_of
from protocol.manifest import BlockId
from tests.support.live_replicas import MANIFEST, downloads, live, replicas_of_everything

if TYPE_CHECKING:
    from pathlib import Path


async def test_the_trunk_comes_with_what_the_runs_seed_drew() -> None:
    client, trunk = downloads()
    tensors, taken = await PartSource(live(replicas_of_everything("a", "b"), client)).fetch_trunk()
    assert tensors.keys() == trunk.keys()
    assert all(torch.equal(tensors[name], t) for name, t in trunk.items())
    assert (taken.version, taken.word, taken.run_tokens) == (9, "two replicas", 4096)
    assert all(params_only for _, params_only, _ in client.asked)


async def test_a_block_of_one_replica_is_taken_on_its_word() -> None:
    client, _ = downloads()
    source = PartSource(live(replicas_of_everything("a"), client))
    part = parts_of(MANIFEST)[6]
    assert part.id == BlockId(1, 1)
    tensors, taken = await source.fetch_block(BlockId(1, 1), part.tensors)
    assert torch.equal(tensors["layers.1.moe.experts.1.w_in"], client.params[BlockId(1, 1)]["w_in"])
    assert set(tensors) == {tensor.name for tensor in part.tensors}
    assert (taken.word, taken.run_tokens) == ("one replica", 0)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trunk checkpoint in"):
        Checkpoint(tmp_path).read(MANIFEST)
