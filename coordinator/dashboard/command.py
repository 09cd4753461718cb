"""`dashboard`: the run's page, served until it is stopped. Off the training path, and without any secret of the run."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from common.errors import DrainingError
from common.folders import FolderClaim, claimed
from common.settings import check_minimums
from common.tasks import until_stopped
from common.text import host_port
from common.web.access import callers_key, names_answered_to
from common.web.feed import Feed
from common.web.http_server import http_server, listening_socket
from common.web.request_checks import CheckConfig
from coordinator.dashboard.app import Shown, build_app
from coordinator.dashboard.config import MINIMUMS
from coordinator.dashboard.credit import CreditWatch
from coordinator.dashboard.history import FILE
from coordinator.dashboard.history_thread import HistoryThread
from coordinator.dashboard.joining import ways_in
from coordinator.dashboard.watch import RunWatch
from dht.addresses import listen_host, served_address
from dht.directory import Directory
from dht.join import fetch_manifest
from dht.node import DhtConfig, DhtNode
from dht.peer_memory import PEERS_FILE
from dht.swarm_config import resolve, told_by
from protocol.admission import Admission
from protocol.identity import Identity

if TYPE_CHECKING:
    import socket

    from coordinator.dashboard.config import DashboardConfig

NO_BODY_BYTES = 0


async def run_dashboard(config: DashboardConfig, stop: asyncio.Event) -> None:
    """Serve the page until `stop`.

    Raises:
        ConfigError: a setting is out of its range, the port is in use, or others could see the run without a key.
        UnavailableError: the swarm does not answer.
    """
    check_minimums(config, MINIMUMS)
    host = await asyncio.to_thread(served_address, config.listen)
    key = await asyncio.to_thread(callers_key, config.key_file, host, "see the run and who is in it")
    with claimed(FolderClaim(folder=config.out, role="dashboard", flag="--out")):
        listener = listening_socket(host, config.port)
        with contextlib.closing(listener):
            try:
                await _show(config, listener, key, stop)
            except DrainingError:
                if not stop.is_set():
                    raise


async def _show(config: DashboardConfig, listener: socket.socket, key: str, stop: asyncio.Event) -> None:
    told = told_by(config)
    admission, initial_peers = resolve(config)
    async with AsyncExitStack() as stack:
        # What is read is signed, so the token of a closed run is of no use here, and cannot be got from here either.
        dht = await until_stopped(_start_dht(config, Admission(admission.run_id), initial_peers), stop)
        stack.push_async_callback(dht.stop)
        dht.on_lost(stop.set)
        manifest = await until_stopped(fetch_manifest(dht, admission.run_id, config.join_timeout_s), stop)
        dht.serve_only(manifest)
        history = await HistoryThread.open(config.out / FILE, manifest.run_id, int(config.history_mb * 1e6))
        stack.push_async_callback(history.close)
        directory, feed = Directory(dht, manifest.run_id, manifest.model, with_reports=True), Feed(config.max_clients)
        watch = RunWatch(directory, manifest, feed, history)
        await until_stopped(watch.look(), stop)
        looking = watch.every(config.refresh_s)
        looking.start()
        stack.push_async_callback(looking.stop)
        credit = CreditWatch(config.credit, manifest)
        await until_stopped(credit.look(), stop)
        adding_up = credit.every(config.credit_s)
        adding_up.start()
        stack.push_async_callback(adding_up.stop)
        ways = ways_in(config, manifest, initial_peers, told)
        shown = Shown(watch=watch, feed=feed, history=history, credit=credit, ways_in=ways, now_s=dht.now_s)
        await _serve(shown, config, listener, key, stop)
        dht.raise_if_lost()


async def _serve(shown: Shown, config: DashboardConfig, listener: socket.socket, key: str, stop: asyncio.Event) -> None:
    host, port = listener.getsockname()[:2]
    names = names_answered_to(host, key)
    app = build_app(
        shown, lambda open_to_all: CheckConfig(key=key, hosts=names, max_body_bytes=NO_BODY_BYTES, for_all=open_to_all)
    )
    async with http_server(app, listener):
        _say_where(shown.watch.snapshot.manifest.run_id, host_port(host, port), config)
        try:
            await stop.wait()
        finally:
            shown.feed.end()  # before the server, which would wait for the streams


async def _start_dht(config: DashboardConfig, admission: Admission, initial_peers: tuple[str, ...]) -> DhtNode:
    return await DhtNode.start(
        DhtConfig(
            identity=Identity.generate(),
            initial_peers=initial_peers,
            host=await asyncio.to_thread(listen_host, config.swarm_listen, initial_peers),
            start_timeout_s=config.join_timeout_s,
            admission=admission,
            peers_file=config.out / PEERS_FILE,
        )
    )


def _say_where(run_id: str, at: str, config: DashboardConfig) -> None:
    """The result goes to standard output; everything else went to standard error."""
    text = Text.assemble((f"run {run_id} is shown at http://{at}/", "bold"), "\n")
    if config.key_file is not None:
        text.append(f"the page asks for the key in {config.key_file}\n")
    Console(soft_wrap=True, highlight=False).print(text)
