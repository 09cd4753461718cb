"""uvicorn on the process's own event loop, for as long as a context lasts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from common.errors import ConfigError
from common.text import host_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import ASGIApp

MAX_CONNECTIONS = 1024
"""Connections and requests that are held open; more are answered with 503."""
KEEP_ALIVE_S = 5
CLOSE_S = 1
"""How long answers that are under way have when the server ends; streams have ended by then."""
BACKLOG = 512


class _Server(uvicorn.Server):
    """The process hears signals by itself."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket at an IP address; port 0 takes a free one. Raises ConfigError, which names the flag."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else "ports end at 65,535"
        raise ConfigError(f"--port: cannot listen on {host_port(host, port)}: {why}") from None
    return listener


@asynccontextmanager
async def http_server(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on a bound socket, which is closed in the end, within CLOSE_S and what uvicorn itself needs."""
    config = uvicorn.Config(
        cast("Any", app),
        lifespan="off",
        ws="none",
        http="h11",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        with contextlib.suppress(OSError):
            listener.close()
