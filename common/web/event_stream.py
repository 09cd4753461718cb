"""Server-sent events: the newest message of a feed, again and again, to one open page."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Message, Receive, Scope, Send

    from common.web.feed import Client, Feed

NO_NEWS_S: Final = 10.0
"""A page without news for so long is sent a sign of life, so that nothing on the way gives it up."""
SLOW_S: Final = 10.0
"""A page that takes nothing of what it is sent for so long is dropped; it asks again when it is back."""
NO_NEWS: Final = b": nothing new\n\n"


class FeedStream(StreamingResponse):
    """Server-sent events; `until` ends with them, however they end."""

    def __init__(self, events: AsyncIterator[bytes], until: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, until the page is closed or takes no more."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SLOW_S):
                await send(message)

        with self._until, contextlib.suppress(TimeoutError):
            await super().__call__(scope, receive, send_in_time)


def event_stream(feed: Feed, name: str) -> FeedStream:
    """A stream of the feed's messages as events called `name`. Raises OverloadedError if too many pages are open."""
    with ExitStack() as stack:
        client = stack.enter_context(feed.joined())
        return FeedStream(_events(client, name.encode()), stack.pop_all())


async def _events(client: Client, name: bytes) -> AsyncIterator[bytes]:
    while not client.has_ended:
        message = await client.news(NO_NEWS_S)
        yield NO_NEWS if message is None else b"event: " + name + b"\ndata: " + message + b"\n\n"
