"""A host whose machine gets another address is found there, and one that was told its address ends non-zero."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from common.errors import UnavailableError
from dht import address_watch
from dht.directory import Directory
from dht.join import publish_manifest
from node.host.command import run_host
from node.host.config import HostConfig
from node.membership import swarm
from tests.support.announcing import MANIFEST, MODEL, OWNER, RUN
from tests.support.dht_nodes import eventually, running_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from dht.node import DhtNode

OLD, NEW = "127.0.0.2", "127.0.0.3"
"""Both are always this machine's: that one of them is gone is what the tests say."""


@pytest.fixture
async def first(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DhtNode]:
    monkeypatch.setattr(address_watch.AddressWatch.__init__, "__defaults__", (0.1,))
    async with running_nodes() as start_one:
        node = await start_one()
        await publish_manifest(node, OWNER, MANIFEST)
        yield node


async def endpoints(first: DhtNode) -> set[str]:
    directory = Directory(first, RUN, MODEL)
    await directory.refresh_now()
    return {peer.endpoint.rpartition(":")[0] for peer in directory.peers()}


def config(first: DhtNode, tmp_path: Path, listen: str) -> HostConfig:
    return HostConfig(
        run_id=RUN,
        initial_peers=first.addresses,
        state=tmp_path,
        listen=listen,
        on_battery=True,
        page_listen="none",
    )


async def test_a_host_follows_its_address(first: DhtNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [OLD]
    monkeypatch.setattr(swarm, "listen_host", lambda *_: here[-1])
    monkeypatch.setattr(address_watch, "listen_host", lambda *_: here[-1])
    monkeypatch.setattr(address_watch, "is_own", lambda host: host == here[-1])
    stop = asyncio.Event()
    hosting = asyncio.create_task(run_host(config(first, tmp_path, "auto"), stop))

    async def is_here() -> bool:
        return await endpoints(first) == {here[-1]}

    await eventually(is_here, 30.0)
    assert await endpoints(first) == {OLD}
    here.append(NEW)
    await eventually(is_here, 30.0)
    assert await endpoints(first) == {NEW}
    assert not hosting.done(), "it moves without ending"
    stop.set()
    await asyncio.wait_for(hosting, 30.0)


async def test_a_host_at_a_given_address_ends_when_that_is_gone(
    first: DhtNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_watch, "is_own", lambda _: False)
    monkeypatch.setattr(address_watch, "GIVEN_UP_S", 0.2)
    with pytest.raises(UnavailableError, match=r"no longer has the address 127\.0\.0\.2, which --listen names"):
        await asyncio.wait_for(run_host(config(first, tmp_path, OLD), asyncio.Event()), 60.0)
