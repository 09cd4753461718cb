"""How a host takes blocks and gives them up: on disk before they are gone, and fewer where there is no room."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from common.errors import NoRoomError
from node.host import block_loader, placement_controller
from node.model.experts.block import new_block as make_block
from protocol.manifest import BlockId, all_blocks
from tests.support.keeping import MANIFEST, keeping

if TYPE_CHECKING:
    from pathlib import Path

    from node.model.experts.block import Block

A, B, C = all_blocks(MANIFEST.model)[:3]


async def test_a_block_that_is_given_up_is_announced_as_stored_and_is_on_disk(tmp_path: Path) -> None:
    with keeping(tmp_path, (A, B)) as host:
        await host.placement.take_first()
        await host.block_manager.give_up([A], grace_s=0)
        assert host.announced == [{A: "stored", B: "serving"}]
        assert set(host.runtime.blocks) == {B} == set(host.replicas.ids())
        assert host.held.given_up == host.store.versions() == {A: 0}


async def test_whoever_loses_patience_leaves_no_block_half_given_up(tmp_path: Path) -> None:
    with keeping(tmp_path, (A, B)) as host:
        await host.placement.take_first()
        impatient = asyncio.create_task(host.block_manager.give_up([A, B], grace_s=0))
        for _ in range(4):  # past the announcement, into the part that goes on alone
            await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        await host.block_manager.give_up([A, B], grace_s=0)
        assert not host.runtime.blocks
        assert set(host.store.versions()) == {A, B}


async def test_a_device_without_room_for_all_blocks_holds_those_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new_block(manifest: object, block_id: BlockId, device: object) -> Block:
        if block_id == C:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nThe rest.")
        return make_block(MANIFEST, block_id, torch.device("cpu"))

    monkeypatch.setattr(block_loader, "new_block", new_block)
    with keeping(tmp_path, (A, B, C)) as host:
        await host.placement.take_first()
        assert set(host.runtime.blocks) == {A, B}
        assert host.planner.max_blocks == 2
        (told,) = host.told("fewer_blocks")
        assert told["max_blocks"] == 2
        assert told["reason"] == "the device has no memory left: CUDA out of memory. Tried to allocate 20.00 GiB."
        await host.placement.recheck()
        assert set(host.runtime.blocks) == {A, B}, "it does not try again and again"


async def test_a_device_without_room_for_one_block_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def new_block(*_: object) -> Block:
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(block_loader, "new_block", new_block)
    with keeping(tmp_path, (A,)) as host, pytest.raises(NoRoomError, match=r"single block: the device has no .*: MPS"):
        await host.placement.take_first()


async def test_for_want_of_memory_one_block_goes_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_controller, "WITHDRAW_GRACE_S", 0.0)
    with keeping(tmp_path, (A, B)) as host:
        await host.placement.take_first()
        await host.placement.give_up_one("it takes too much")
        assert len(host.runtime.blocks) == host.planner.max_blocks == 1
        await host.placement.give_up_one("it still takes too much")
        assert len(host.runtime.blocks) == 1


async def test_fewer_blocks_that_the_owner_wants_are_given_up_at_once_and_taken_again_when_more_may_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_controller, "WITHDRAW_GRACE_S", 0.0)
    with keeping(tmp_path, (A, B)) as host:
        await host.placement.take_first()
        await host.placement.follow(1)
        assert len(host.runtime.blocks) == host.planner.max_blocks == 1
        await host.placement.follow(2)
        await host.placement.recheck()
        assert set(host.runtime.blocks) == {A, B}, "those that were asked for are not forgotten"


async def test_blocks_that_a_recheck_takes_already_are_here_when_the_first_are_taken(tmp_path: Path) -> None:
    with keeping(tmp_path, ()) as host:
        recheck = asyncio.create_task(host.placement.recheck())
        await asyncio.sleep(0)
        assert host.held.joining, "it has begun"
        await host.placement.take_first()
        assert len(host.held.serving) == host.planner.max_blocks
        await recheck
