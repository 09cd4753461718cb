"""A host that pauses, comes back, sleeps and leaves, with a real runtime and real files, in a swarm as a test says."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from dht.view import PeerInfo
from node.host import hand_over as hand_over_module
from node.host import pause as pause_module
from node.host.availability import Availability, Reason
from node.host.hand_over import HandOver
from node.host.pause import Pause
from protocol.manifest import all_blocks
from tests.support.keeping import MANIFEST, keeping
from tests.support.swarm_parts import make_replica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from protocol.manifest import BlockId
    from tests.support.keeping import Keeping

A, B = all_blocks(MANIFEST.model)[:2]


class Swarm:
    """Who else is there."""

    def __init__(self) -> None:
        self.serving: dict[BlockId, list[str]] = {}
        self.hosts: list[str] = []
        self.averaging = 1
        self.looked = 0

    def replicas(self, block_id: BlockId) -> list[Any]:
        return [make_replica(block_id, peer_id, "127.0.0.1:1") for peer_id in self.serving.get(block_id, ())]

    def peers(self) -> list[PeerInfo]:
        self.looked += 1
        return [peer(peer_id) for peer_id in self.hosts]

    async def refresh_now(self) -> None:
        """From memory."""

    def start(self) -> None:
        self.averaging += 1

    async def stop(self) -> None:
        self.averaging -= 1


def peer(peer_id: str) -> PeerInfo:
    numbers = {"started_s": 0.0, "n_blocks": 0, "tokens_per_s": 0.0, "run_tokens": 0, "queue_tokens": 0}
    return PeerInfo(peer_id=peer_id, role="host", endpoint="", software="", expiration_s=2e9, **cast("Any", numbers))


class Scene:
    def __init__(self, host: Keeping, swarm: Swarm, availability: Availability) -> None:
        self.host, self.swarm, self.availability = host, swarm, availability
        there = cast("Any", swarm)
        self.pause = Pause(availability, host.block_manager, host.placement, there, host.runtime, host.log)
        self.hand_over = HandOver(host.block_manager, there, there, "own", host.log)

    async def heard(self, event: str, count: int = 1) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while len(self.host.told(event)) < count:  # noqa: ASYNC110 - the log has no event to wait for
                await asyncio.sleep(0.001)
        return self.host.told(event)[-1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pause_module, "PAUSE_GRACE_S", 0.001)
    monkeypatch.setattr(hand_over_module, "PAUSE_GRACE_S", 0.001)
    monkeypatch.setattr(hand_over_module, "CHECK_S", 0.001)
    monkeypatch.setattr(hand_over_module, "HAND_OVER_S", 0.2)


@asynccontextmanager
async def scene(folder: Path, *blocks: BlockId) -> AsyncIterator[Scene]:
    with keeping(folder, blocks) as host:
        availability = Availability()
        there = Scene(host, Swarm(), availability)
        await host.placement.take_first()
        following = asyncio.create_task(there.pause.follow())
        try:
            yield there
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def test_a_paused_host_has_its_blocks_on_disk_only_and_answers_nobody(tmp_path: Path) -> None:
    async with scene(tmp_path, A, B) as there:
        there.availability.tell(Reason.OWNER, "its owner paused it")
        told = await there.heard("paused")
        assert told["reasons"] == ["its owner paused it"]
        assert told["stored"] == 2
        assert not there.host.runtime.blocks
        assert set(there.host.store.versions()) == {A, B}
        assert there.host.announced[-1] == {A: "stored", B: "stored"}
        assert there.swarm.averaging == 0
        assert there.availability.refusal() is not None


async def test_a_host_that_comes_back_serves_and_averages_again(tmp_path: Path) -> None:
    async with scene(tmp_path, A, B) as there:
        there.host.runtime.blocks[A].version = 7
        there.availability.tell(Reason.SCHEDULE, "it is outside its schedule")
        await there.heard("paused")
        there.availability.tell(Reason.SCHEDULE, "")
        assert (await there.heard("resumed"))["blocks"] == 2
        assert there.host.runtime.blocks[A].version == 7
        assert there.host.announced[-1] == {A: "serving", B: "serving"}
        assert there.swarm.averaging == 1
        assert there.availability.refusal() is None


async def test_a_second_reason_keeps_a_host_paused_when_the_first_one_ends(tmp_path: Path) -> None:
    async with scene(tmp_path, A) as there:
        there.availability.tell(Reason.OWNER, "its owner paused it")
        await there.heard("paused")
        there.availability.tell(Reason.PERSON, "somebody uses the machine's keyboard or mouse")
        there.availability.tell(Reason.OWNER, "")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not there.host.told("resumed")
        there.availability.tell(Reason.PERSON, "")
        await there.heard("resumed")


async def test_a_pause_while_blocks_are_fetched_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, A) as there:
        there.availability.tell(Reason.OWNER, "its owner paused it")
        await there.heard("paused")
        fetching = asyncio.Event()

        async def forever() -> None:
            fetching.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(there.host.placement, "take_first", forever)
        there.availability.tell(Reason.OWNER, "")
        async with asyncio.timeout(10):
            await fetching.wait()
        there.availability.tell(Reason.OWNER, "its owner paused it")
        await there.heard("paused", count=2)
        assert not there.host.told("resumed")


async def test_a_machine_that_wakes_fetches_its_blocks_anew_by_itself(tmp_path: Path) -> None:
    async with scene(tmp_path, A) as there:
        before = there.host.runtime.blocks[A]
        there.availability.tell(Reason.SLEPT, "the machine slept")
        assert (await there.heard("paused"))["reasons"] == ["the machine slept"]
        await there.heard("resumed")
        assert there.host.runtime.blocks[A] is not before
        assert there.availability.working.is_set()


async def test_whoever_leaves_goes_as_soon_as_others_serve_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over_module, "HAND_OVER_S", 60.0)
    async with scene(tmp_path, A, B) as there:
        there.swarm.hosts, there.swarm.serving = ["other"], {A: ["other", "own"], B: ["own"]}
        monkeypatch.setattr(there.host.held, "catch_up", nothing)
        leaving = asyncio.create_task(there.hand_over.run())
        async with asyncio.timeout(10):
            while there.swarm.looked < 3:  # noqa: ASYNC110 - it looks again and again, and B is still missing
                await asyncio.sleep(0.001)
        assert there.host.announced[-1] == {A: "stored", B: "stored"}
        there.swarm.serving[B] = ["own", "other"]
        await leaving
        assert there.host.told("handed_over")[-1]["left"] == []


async def test_what_nobody_takes_is_named_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, A, B) as there:
        there.swarm.hosts, there.swarm.serving = ["other"], {A: ["other"]}
        monkeypatch.setattr(there.host.held, "catch_up", nothing)
        await there.hand_over.run()
        told = there.host.told("handed_over")[-1]
        assert (told["blocks"], told["left"]) == (1, [str(B)])
        assert set(there.host.store.versions()) == {A, B}


async def test_alone_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over_module, "HAND_OVER_S", 1000.0)
    async with scene(tmp_path, A) as there:
        monkeypatch.setattr(there.host.held, "catch_up", nothing)
        async with asyncio.timeout(10):
            await there.hand_over.run()
        assert there.host.told("handed_over")[-1]["left"] == [str(A)]


async def nothing(_: object) -> None:
    """Nobody is there to average with."""
