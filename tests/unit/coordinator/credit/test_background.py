"""Credit beside a coordinator: it goes on whatever a collection comes to, and ends with its context."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from common.errors import UnavailableError
from coordinator.credit import background
from coordinator.credit.background import collecting
from coordinator.credit.collector import Collected

if TYPE_CHECKING:
    import pytest

SOON_S = 0.001
WAIT_S = 10.0
NOTHING = Collected(asked=1, answered=0, new=0, refused=0)


class Collection:
    """Fails twice, and then finds nothing."""

    def __init__(self) -> None:
        self.looks = self.collections = 0

    async def look(self) -> None:
        self.looks += 1
        if self.looks < 3:
            raise UnavailableError("dht: no answer")

    async def collect(self) -> Collected:
        self.collections += 1
        if self.collections < 3:
            raise UnavailableError("dht: no answer")
        return NOTHING


async def test_what_fails_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "LOOK_S", SOON_S)
    collection, told = Collection(), asyncio.Queue[Collected]()
    anything: Any = collection
    async with collecting(anything, SOON_S, told.put_nowait):
        assert await asyncio.wait_for(told.get(), WAIT_S) == NOTHING
        assert await asyncio.wait_for(told.get(), WAIT_S) == NOTHING
    assert collection.collections >= 4
    assert collection.looks >= 1
    assert [record.message for record in caplog.records] == ["Receipts are not collected now: dht: no answer"]
