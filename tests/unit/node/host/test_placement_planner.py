"""What a host begins anew: in a run that has trained nothing, until those who have it had time to come."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest

from node.host.placement import PlacementConfig
from protocol.manifest import BlockId, all_blocks
from tests.support.keeping import MANIFEST, keeping
from tests.support.run_views import peer_info, replica

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.keeping import Keeping

BLOCKS = tuple(all_blocks(MANIFEST.model))
MINE, THEIRS = BLOCKS[:2], BLOCKS[2:4]
WAIT_S = PlacementConfig(max_blocks=1, target_replicas=1).anew_after_s


def later(keeper: Keeping, seconds: float) -> None:
    keeper.directory.view = replace(keeper.directory.view, taken_s=keeper.directory.view.taken_s + seconds)


@pytest.mark.parametrize("fixed", [(), BLOCKS[:4]])
async def test_when_all_hosts_start_again_each_takes_what_is_on_its_disk_and_leaves_the_rest_to_the_others(
    tmp_path: Path, fixed: tuple[BlockId, ...]
) -> None:
    with keeping(tmp_path, fixed, max_blocks=4) as keeper:
        keeper.held.stored = dict.fromkeys(MINE, 300)
        await keeper.planner.refresh()
        assert set(keeper.planner.first(keeper.held)) == set(MINE)
        later(keeper, WAIT_S - 1)
        assert set(keeper.planner.moves(keeper.held).take) == set(MINE)
        later(keeper, 1)
        assert len(keeper.planner.moves(keeper.held).take) == 4


async def test_what_others_have_is_taken_at_once(tmp_path: Path) -> None:
    with keeping(tmp_path, THEIRS) as keeper:
        seen = keeper.directory.view
        theirs = {block: (replica(block, 1, 300),) for block in THEIRS[:1]}
        stored = (replica(THEIRS[1], 1, 300, state="stored"),)
        keeper.directory.view = replace(seen, replicas=MappingProxyType({**seen.replicas, **theirs}), others=stored)
        await keeper.planner.refresh()
        assert set(keeper.planner.first(keeper.held)) == set(THEIRS)


async def test_where_a_trainer_has_trained_a_new_host_waits_too(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        keeper.directory.view = replace(keeper.directory.view, peers=(peer_info(5, "trainer", 0),))
        await keeper.planner.refresh()
        assert keeper.planner.first(keeper.held) == ()
        later(keeper, WAIT_S)
        assert len(keeper.planner.moves(keeper.held).take) == 3


async def test_in_a_run_that_has_not_trained_nobody_waits(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        keeper.held.stored = dict.fromkeys(MINE, 0)
        await keeper.planner.refresh()
        assert len(keeper.planner.first(keeper.held)) == 3
