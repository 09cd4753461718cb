"""A machine's address goes: what follows, what ends, what waits."""

from __future__ import annotations

import asyncio
import logging

import pytest

from common.errors import ConfigError, UnavailableError
from dht import address_watch
from dht.address_watch import GIVEN_UP_S, AddressWatch

PEERS = ("/ip4/10.77.0.1/tcp/4001/p2p/12D3KooWx",)
SOON_S = 5.0


class Machine:
    """Its addresses, and the one from which it reaches the swarm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own, self.route = {"10.77.0.2"}, "10.77.0.2"
        self.looks = 0
        monkeypatch.setattr(address_watch, "is_own", self._is_own)
        monkeypatch.setattr(address_watch, "listen_host", self._listen_host)

    def _is_own(self, host: str) -> bool:
        self.looks += 1
        return host in self.own

    def _listen_host(self, *_: object) -> str:
        if not self.route:
            raise ConfigError("no way")
        return self.route


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def watch(listen: str, look_s: float = 0.001) -> AddressWatch:
    return AddressWatch(listen, "10.77.0.2", PEERS, look_s)


async def until_looked(machine: Machine, times: int) -> None:
    wanted = machine.looks + times
    while machine.looks < wanted:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.001)


async def test_a_node_follows_its_address(machine: Machine) -> None:
    found, stop = watch("auto"), asyncio.Event()
    async with found.stopping(stop) as ended:
        await until_looked(machine, 3)
        assert not ended.is_set()
        machine.own, machine.route = {"10.77.0.9"}, "10.77.0.9"
        await asyncio.wait_for(ended.wait(), SOON_S)
    assert (found.moved_to, stop.is_set()) == ("10.77.0.9", False)
    found.raise_if_lost()


async def test_without_any_network_it_waits_for_one(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    found = watch("auto")
    async with found.stopping(asyncio.Event()) as ended:
        machine.own, machine.route = set(), ""
        await until_looked(machine, 10)
        assert not ended.is_set()
        machine.route = "10.77.0.9"
        await asyncio.wait_for(ended.wait(), SOON_S)
    assert caplog.text.count("waiting") == 1


async def test_an_address_that_was_only_renewed_is_kept(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = watch("10.77.0.2", look_s=0.01)
    async with found.stopping(asyncio.Event()) as ended:
        machine.own = set()
        await until_looked(machine, 2)
        machine.own = {"10.77.0.2"}
        await until_looked(machine, 2)
        assert not ended.is_set()
    assert f"this node ends if it is not back within {GIVEN_UP_S:g} s" in caplog.text
    assert "has the address 10.77.0.2 again" in caplog.text


async def test_one_that_was_given_ends_the_node_when_it_is_gone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_watch, "GIVEN_UP_S", 0.01)
    machine.own = set()
    found = watch("10.77.0.2")
    async with found.stopping(asyncio.Event()) as ended:
        await asyncio.wait_for(ended.wait(), SOON_S)
    assert not found.moved_to
    with pytest.raises(UnavailableError, match=r"no longer has the address 10\.77\.0\.2, which --listen names"):
        found.raise_if_lost()


async def test_a_stop_ends_it_too(machine: Machine) -> None:
    found, stop = watch("auto"), asyncio.Event()
    async with found.stopping(stop) as ended:
        await until_looked(machine, 1)
        stop.set()
        await asyncio.wait_for(ended.wait(), SOON_S)
    assert not found.moved_to


async def test_a_mistake_in_the_watch_does_not_end_a_node_as_if_it_had_been_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: str) -> bool:
        raise RuntimeError("no list of addresses")

    monkeypatch.setattr(address_watch, "is_own", fails)
    with pytest.raises(RuntimeError, match="no list of addresses"):
        async with watch("auto").stopping(asyncio.Event()) as ended:
            await asyncio.wait_for(ended.wait(), SOON_S)
