"""The door to a host's page: a socket at which the page's process is started once somebody knocks.

The page is another process, so that it can cost the host nothing: it ends when nobody has looked for a while, it may
fail or be killed, and the next who knocks has a new one. Until then there is none. Light: no torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from common.atomic_file import write_atomically
from common.backoff import backoff_s
from common.errors import ConfigError
from common.log_tail import NOT_KEPT
from common.secret_file import secret_in
from common.tasks import on_thread
from common.text import host_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger(__name__)

PROGRAM: Final = (sys.executable, str(Path(__file__).resolve().parents[2] / "run_node.py"))
"""The command line up to the subcommand."""

TOKEN_FILE, URL_FILE = "page.token", "page.url"
NO_PAGE: Final = "none"
NEXT_PORTS: Final = 20
"""So many ports from the wanted one on are tried before any that is free."""

MAX_PORT: Final = 65_535
BACKLOG: Final = 64
STOP_S: Final = 1.5
"""How long the page has to end once its host does."""

SOON_S: Final = 10.0
"""A page that ended with an error within so many seconds has failed to start: the next one is waited with."""

FAILED_PAUSE_S, MAX_DOUBLINGS = 2.0, 7


class PageAddress(NamedTuple):
    """An IP address of this machine, and a port; 0 is any that is free."""

    host: str
    port: int

    @property
    def is_this_machine_only(self) -> bool:
        """Whether nobody from elsewhere can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


def page_address(text: str, name: str) -> PageAddress | None:
    """ADDRESS:PORT, or None for none; raises ConfigError, which calls the setting `name`."""
    if text == NO_PAGE:
        return None
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        address = str(ipaddress.ip_address(host))
        if port.isascii() and port.isdecimal() and int(port) <= MAX_PORT:
            return PageAddress(address, int(port))
    raise ConfigError(f"{name}: is {text[:60]!r}, must be ADDRESS:PORT, such as 127.0.0.1:8090, or {NO_PAGE}")


def page_listener(wanted: PageAddress) -> socket.socket:
    """A socket at that address or, if its port is taken, at one of the next or any other. Raises OSError."""
    ports = [port for port in range(wanted.port, wanted.port + NEXT_PORTS) if port <= MAX_PORT] if wanted.port else []
    for port in ports:
        with contextlib.suppress(OSError):
            return _bound(wanted.host, port)
    return _bound(wanted.host, 0)


def page_url(listener: socket.socket, token: str) -> str:
    """What the owner opens. A page that listens on every address is named by this machine's own."""
    host, port = listener.getsockname()[:2]
    unspecified = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - it is what such a page is not called by
    return f"http://{host_port(unspecified.get(host, host), port)}/enter?token={token}"


@asynccontextmanager
async def page_door(
    folder: Path, address: PageAddress | None, program: tuple[str, ...] = PROGRAM
) -> AsyncIterator[None]:
    """Have the page of the host of a folder at `address` while the context lasts, if there is one.

    What goes wrong is a warning: no host ends, or waits, for its page.
    """
    if address is None:
        yield
        return
    try:
        token = secret_in(folder / TOKEN_FILE, str(folder / TOKEN_FILE))
        listener = page_listener(address)
    except (ConfigError, OSError) as error:
        logger.warning("The page of this host cannot be shown: %s; it works without", error)
        yield
        return
    _tell(listener, address, folder, token)
    keeping = asyncio.create_task(_Door(listener, folder, program).keep(), name="page")
    try:
        yield
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        listener.close()
        (folder / URL_FILE).unlink(missing_ok=True)


class _Door:
    """Waits for somebody who knocks, and then for the process that lets them in to end; again and again."""

    def __init__(self, listener: socket.socket, folder: Path, program: tuple[str, ...]) -> None:
        self._listener, self._folder, self._program = listener, folder, program
        self._failures = 0

    async def keep(self) -> None:
        """Until cancelled, and then the page ends too."""
        while True:
            await _knocked(self._listener)
            started_s = time.monotonic()
            code = await self._show()
            is_early = time.monotonic() - started_s < SOON_S
            self._failures = self._failures + 1 if code and is_early else 0
            if code:
                logger.warning("The page of this host ended with exit code %d; the host goes on", code)
                await asyncio.sleep(backoff_s(FAILED_PAUSE_S, self._failures, max_doublings=MAX_DOUBLINGS))

    async def _show(self) -> int:
        """Serve the page from a process of its own until that ends; its exit code."""
        try:
            process = self._started()  # within milliseconds, and with nothing to undo if the host ends meanwhile
        except OSError as error:
            logger.warning("The page of this host cannot be started: %s", error.strerror or error)
            return 1
        ended = asyncio.wrap_future(on_thread("page", process.wait))
        try:
            return await asyncio.shield(ended)
        finally:
            await _end(process, ended)

    def _started(self) -> subprocess.Popen[bytes]:
        """Not by the event loop, which would fork the way that disturbs gRPC's threads."""
        descriptor = self._listener.fileno()
        told = ("--state", str(self._folder), "--listen-fd", str(descriptor), "--log-level", "warning")
        return subprocess.Popen(
            (*self._program, "page", *told, "--stop-on-stdin-eof"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl+C in the terminal is for the host, which ends the page
        )


async def _end(process: subprocess.Popen[bytes], ended: asyncio.Future[int]) -> None:
    """Ask it to end, and kill it if it does not."""
    for stop in (process.terminate, process.kill):
        if not ended.done():
            stop()
            await asyncio.wait({ended}, timeout=STOP_S)
    if process.stdin is not None:
        process.stdin.close()


async def _knocked(listener: socket.socket) -> None:
    """Return once a connection waits at the socket, which is left to whoever takes it."""
    loop, knocked = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, knocked.set)
    try:
        await knocked.wait()
    finally:
        loop.remove_reader(listener)


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.settimeout(0)
    except OSError:
        listener.close()
        raise
    return listener


def _tell(listener: socket.socket, wanted: PageAddress, folder: Path, token: str) -> None:
    """Say where the page is, in the log and in a file for its owner alone."""
    url, port = page_url(listener, token), listener.getsockname()[1]
    if wanted.port and port != wanted.port:
        logger.warning("Port %d is taken, so the page of this host is at port %d", wanted.port, port)
    if not wanted.is_this_machine_only:
        logger.warning("The page of this host can be reached from elsewhere, unencrypted, by whoever has its token")
    logger.info("Its page, for you alone: %s", url, extra={NOT_KEPT: True})
    try:
        write_atomically(folder / URL_FILE, f"{url}\n".encode(), mode=0o600)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", folder / URL_FILE, error.strerror)
