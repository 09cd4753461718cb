"""Which channels a node keeps open, and which it lets go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import DeadlineError, UnavailableError
from protocol import channels
from protocol.channels import Channels
from protocol.endpoints import Address
from protocol.security import NotConnectedError

ONE, TWO = (Address(f"peer-{i}", f"192.0.2.{i}:4000") for i in (1, 2))
SOON_S = 5.0


class Channel:
    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def close(self, _grace_s: float) -> None:
        self.closed.set()


class Caller:
    """Opens channels at once; `opened` has them in order."""

    def __init__(self) -> None:
        self.opened: list[tuple[Address, Channel]] = []

    async def open(self, address: Address, _timeout_s: float) -> Channel:
        self.opened.append((address, Channel()))
        return self.opened[-1][1]


def channels_of(caller: object) -> Channels:
    anybody: Any = caller
    return Channels(anybody)


async def test_one_channel_serves_every_call_to_an_address() -> None:
    caller = Caller()
    kept = channels_of(caller)
    assert await kept.get(ONE, SOON_S) is await kept.get(ONE, SOON_S)
    await kept.get(TWO, SOON_S)
    assert [address for address, _ in caller.opened] == [ONE, TWO]
    await kept.close()
    assert all(channel.closed.is_set() for _, channel in caller.opened)


async def test_a_channel_that_nobody_uses_is_closed_when_another_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller()
    kept = channels_of(caller)
    await kept.get(ONE, SOON_S)
    monkeypatch.setattr(channels, "UNUSED_S", 0.0)
    await asyncio.sleep(0.001)  # the clock goes on
    await kept.get(TWO, SOON_S)
    await asyncio.wait_for(caller.opened[0][1].closed.wait(), SOON_S)
    assert not caller.opened[1][1].closed.is_set()
    await kept.close()


async def test_a_channel_that_was_used_of_late_stays() -> None:
    caller = Caller()
    kept = channels_of(caller)
    first = await kept.get(ONE, SOON_S)
    await kept.get(TWO, SOON_S)
    assert await kept.get(ONE, SOON_S) is first
    await kept.close()


async def test_what_could_not_be_opened_is_tried_again() -> None:
    class Refused(Caller):
        async def open(self, address: Address, timeout_s: float) -> Channel:
            channel = await super().open(address, timeout_s)
            if len(self.opened) == 1:
                raise UnavailableError("refused")
            return channel

    kept = channels_of(Refused())
    with pytest.raises(UnavailableError, match="refused"):
        await kept.get(ONE, SOON_S)
    assert await kept.get(ONE, SOON_S)
    await kept.close()


async def test_who_gives_up_leaves_the_opening_to_others() -> None:
    class Slow(Caller):
        def __init__(self) -> None:
            super().__init__()
            self.goes_on = asyncio.Event()

        async def open(self, address: Address, timeout_s: float) -> Channel:
            await self.goes_on.wait()
            return await super().open(address, timeout_s)

    caller = Slow()
    kept = channels_of(caller)
    patient = asyncio.create_task(kept.get(ONE, SOON_S))
    with pytest.raises(DeadlineError, match="no connection to"):
        await kept.get(ONE, 0.01)
    caller.goes_on.set()
    assert await patient
    await kept.close()


class NeverOpens:
    async def open(self, _address: Address, _timeout_s: float) -> Channel:
        opened: Channel = await asyncio.get_running_loop().create_future()
        return opened


async def test_who_waits_for_a_channel_that_another_call_drops_is_told_and_not_cancelled() -> None:
    node = channels_of(NeverOpens())
    waiting = asyncio.create_task(node.get(ONE, SOON_S))
    await asyncio.sleep(0)
    node.drop(ONE)
    with pytest.raises(NotConnectedError, match="was given up while it was opened"):
        await waiting
    await node.close()


async def test_who_is_cancelled_while_it_waits_for_a_channel_stays_cancelled() -> None:
    node = channels_of(NeverOpens())
    waiting = asyncio.create_task(node.get(ONE, SOON_S))
    await asyncio.sleep(0)
    node.drop(ONE)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await node.close()
