"""`page`: a host's page, served until it is stopped or, if its host has started it, until nobody looks any more."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from rich.console import Console

from common.errors import ConfigError
from common.secret_file import secret_in
from common.web.feed import Feed
from common.web.http_server import http_server
from node.host.page.app import ShownHost, build_app
from node.host.page.gate import GateConfig, local_names
from node.host.page.watch import HostWatch
from node.host.page_door import TOKEN_FILE, PageAddress, page_address, page_listener, page_url

if TYPE_CHECKING:
    from node.host.config import PageConfig

MAX_PAGES: Final = 16
"""Open pages that are kept up to date."""

IDLE_S: Final = 120.0
"""A page that its host has started ends when none was open for so long; the next who comes has a new one."""


async def run_page(config: PageConfig, stop: asyncio.Event) -> None:
    """Serve the page until `stop`, or until nobody looks any more.

    Raises:
        ConfigError: the address is not one of this machine, the folder is of no host, or its token open to others.
    """
    listener = _listener(config)
    with contextlib.closing(listener):
        if not config.state.is_dir():
            raise ConfigError(f"--state {config.state}: there is no such folder; name that of a host")
        token = secret_in(config.state / TOKEN_FILE, str(config.state / TOKEN_FILE))
        if config.listen_fd < 0:
            Console(soft_wrap=True, highlight=False).print(f"the page, for you alone: {page_url(listener, token)}")
        await _serve(config, listener, token, stop)


def _listener(config: PageConfig) -> socket.socket:
    """The socket that the host has opened, or one of its own."""
    if config.listen_fd >= 0:
        try:
            return socket.socket(fileno=config.listen_fd)
        except OSError as error:
            raise ConfigError(f"--listen-fd {config.listen_fd}: is no open socket: {error.strerror}") from None
    address = page_address(config.listen, "listen")
    if address is None:
        raise ConfigError("listen: must be ADDRESS:PORT here, such as 127.0.0.1:8090")
    try:
        return page_listener(address)
    except OSError as error:
        raise ConfigError(f"listen: cannot listen on {config.listen}: {error.strerror}") from None


async def _serve(config: PageConfig, listener: socket.socket, token: str, stop: asyncio.Event) -> None:
    host, port = listener.getsockname()[:2]
    names = local_names(port) if PageAddress(host, port).is_this_machine_only else frozenset[str]()
    gate, feed = GateConfig(token=token, names=names, port=port), Feed(MAX_PAGES)
    watch = HostWatch(config.state, feed, gate.act_key)
    async with AsyncExitStack() as stack:
        looking = watch.every()
        looking.start()
        stack.push_async_callback(looking.stop)
        app = build_app(ShownHost(folder=config.state, feed=feed, soon=looking.hurry), gate)
        await stack.enter_async_context(http_server(app, listener))
        stack.callback(feed.end)  # before the server, which would wait for the streams
        await _until_unused(watch, stop) if config.listen_fd >= 0 else await stop.wait()


async def _until_unused(watch: HostWatch, stop: asyncio.Event) -> None:
    """Return once `stop` is set, or once no page was open for IDLE_S."""
    while not stop.is_set() and (left_s := watch.looked_at_s + IDLE_S - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await stop.wait()
