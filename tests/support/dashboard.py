"""A page's server over views that a test sets, without a DHT."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import httpx

from common.errors import UnavailableError
from common.web.access import names_answered_to
from common.web.feed import Feed
from common.web.request_checks import CheckConfig
from coordinator.dashboard.app import Shown, build_app
from coordinator.dashboard.credit import CreditWatch
from coordinator.dashboard.history import FILE
from coordinator.dashboard.history_thread import HistoryThread
from coordinator.dashboard.joining import WaysIn
from coordinator.dashboard.watch import RunWatch
from tests.support.run_views import MANIFEST, averaged, reported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from common.web.files import WithHeaders
    from dht.view import DirectoryView
    from protocol.manifest import Manifest

BASE = "http://localhost:8080"
MB = 1 << 20


class ViewedDirectory:
    """A directory whose view a test sets, and which it may cut off by saying why."""

    def __init__(self, view: DirectoryView | None = None) -> None:
        self.view = view or replace(averaged(), reports=(reported(20),))
        self.problem = ""

    async def refresh_now(self) -> None:
        if self.problem:
            raise UnavailableError(self.problem)

    def snapshot(self, *, with_avoided: bool = False) -> DirectoryView:
        return self.view

    def later(self, seconds: float) -> None:
        self.view = replace(self.view, taken_s=self.view.taken_s + seconds)


@dataclass(frozen=True, kw_only=True)
class PageServer:
    """What a test holds of a server: its application, and the parts behind it."""

    app: WithHeaders
    watch: RunWatch
    directory: ViewedDirectory
    feed: Feed
    credit: CreditWatch

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=BASE, headers=headers)


@asynccontextmanager
async def page_server(
    folder: Path,
    *,
    key: str = "",
    max_clients: int = 4,
    directory: ViewedDirectory | None = None,
    manifest: Manifest = MANIFEST,
    credit_in: Path | None = None,
) -> AsyncIterator[PageServer]:
    """A server that has looked once; its history is in `folder`."""
    directory, feed = directory or ViewedDirectory(), Feed(max_clients)
    history = await HistoryThread.open(folder / FILE, manifest.run_id, 16 * MB)
    watch = RunWatch(directory, manifest, feed, history)
    await watch.look()
    credit = CreditWatch(credit_in, manifest)
    await credit.look()
    shown = Shown(
        watch=watch,
        feed=feed,
        history=history,
        credit=credit,
        ways_in=WaysIn(invite="kh1x", expires_s=0, closed=False, package="kilohive", image="kilohive"),
        now_s=lambda: directory.view.taken_s,
    )
    names = names_answered_to("127.0.0.1", key)
    app = build_app(shown, lambda open_to_all: CheckConfig(key=key, hosts=names, max_body_bytes=0, for_all=open_to_all))
    try:
        yield PageServer(app=app, watch=watch, directory=directory, feed=feed, credit=credit)
    finally:
        await history.close()
