"""When a host's page ends by itself, and what it refuses before it begins."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from common.errors import ConfigError
from common.web.feed import Feed
from node.host.config import PageConfig
from node.host.page import command as module
from node.host.page.command import run_page
from node.host.page.watch import HostWatch

if TYPE_CHECKING:
    from pathlib import Path

SOON_S = 10.0


async def test_a_page_that_its_host_has_started_ends_once_nobody_has_looked_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    watch = HostWatch(tmp_path, Feed(1), "word")
    async with asyncio.timeout(SOON_S):
        await module._until_unused(watch, asyncio.Event())
    assert time.monotonic() >= watch.looked_at_s + 0.05


async def test_a_page_that_is_stopped_ends_at_once(tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    watch = HostWatch(tmp_path, Feed(1), "word")
    async with asyncio.timeout(SOON_S):
        await module._until_unused(watch, stop)
    assert time.monotonic() - watch.looked_at_s < module.IDLE_S


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"listen": "none"}, "listen: must be ADDRESS:PORT here"),
        ({"listen": "nowhere"}, "listen: is 'nowhere', must be ADDRESS:PORT"),
        ({"listen": "192.0.2.1:0"}, "listen: cannot listen on 192.0.2.1:0: "),
        ({"listen_fd": 9999}, "--listen-fd 9999: is no open socket: "),
    ],
)
async def test_an_address_that_cannot_be_is_one_sentence(
    tmp_path: Path, changes: dict[str, str | int], words: str
) -> None:
    config = PageConfig(state=tmp_path, **changes)  # type: ignore[arg-type] # each has its setting's type
    with pytest.raises(ConfigError) as caught:
        await run_page(config, asyncio.Event())
    assert str(caught.value).startswith(words)


async def test_a_folder_that_is_not_there_is_no_hosts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder; name that of a host"):
        await run_page(PageConfig(state=tmp_path / "nowhere", listen="127.0.0.1:0"), asyncio.Event())
