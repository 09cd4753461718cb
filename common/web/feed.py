"""The latest message for every open page: a bounded number of them, each with one message at most that it still lacks.

A page that is slower than the messages come misses some and gets the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_S = 15.0


class Client:
    """One open page."""

    def __init__(self, latest: bytes | None) -> None:
        self._latest = latest
        self._has_news = asyncio.Event()
        self.has_ended = False
        if latest is not None:
            self._has_news.set()

    def tell(self, message: bytes) -> None:
        """Have it get this message, and none that it still lacked."""
        self._latest = message
        self._has_news.set()

    def end(self) -> None:
        """Have it get nothing more."""
        self._latest, self.has_ended = None, True
        self._has_news.set()

    async def news(self, timeout_s: float) -> bytes | None:
        """Wait for the newest message; None if none comes within `timeout_s`, or if it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_news.wait()
            self._has_news.clear()
            return self._latest
        return None


class Feed:
    """Keeps open pages up to date. It belongs to the event loop."""

    def __init__(self, max_clients: int) -> None:
        self._max_clients = max_clients
        self._clients: set[Client] = set()
        self._latest: bytes | None = None

    @property
    def n_clients(self) -> int:
        """Pages that are open now."""
        return len(self._clients)

    def publish(self, message: bytes) -> None:
        """Give every page this message."""
        self._latest = message
        for client in self._clients:
            client.tell(message)

    def forget(self) -> None:
        """Have a page that is opened later wait for the next message: the latest is old."""
        self._latest = None

    def end(self) -> None:
        """Have every page's stream end, as the server does."""
        for client in self._clients:
            client.end()

    @contextmanager
    def joined(self) -> Iterator[Client]:
        """A page that is told everything from the latest message on. Raises OverloadedError if there are too many."""
        if len(self._clients) >= self._max_clients:
            raise OverloadedError(f"{self._max_clients} pages are kept up to date already, which are the most", RETRY_S)
        client = Client(self._latest)
        self._clients.add(client)
        try:
            yield client
        finally:
            self._clients.discard(client)
