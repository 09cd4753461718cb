"""The stream under an exchange or a download: raw messages each way, counted, bounded, with deadlines.

Whatever carries the bytes is a `MessageStream`: gRPC from either side, or memory in tests.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from common.errors import DeadlineError, KilohiveError, UnavailableError
from node.limits.rate_limits import RateLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

T = TypeVar("T")

logger = logging.getLogger(__name__)

ALIVE = b""
"""A message without a body."""

ALIVE_PER_SILENCE = 4
MAX_REST_S = 2.0
"""The longest rest before the next message is read: a sender whose message is not taken for 5 s believes its
partner dead. What is owed beyond that is left to whoever takes something next."""


class Receiver(Protocol):
    """The receiving half of a stream of messages."""

    async def receive(self) -> bytes | None:
        """The next message, None when the other side sends no more.

        Raises:
            KilohiveError: the partner's own, or UnavailableError when it is gone.
        """


class MessageStream(Receiver, Protocol):
    """One bidirectional stream of messages."""

    async def send(self, raw: bytes) -> None:
        """Send one message; raises like `receive`."""


class Inbox:
    """Messages that come; `n_bytes` counts them. Empty ones only say that the partner is alive, and are passed over.

    After a message it rests as long as `rate_limits` ask for.
    """

    def __init__(self, receiver: Receiver, rate_limits: RateLimits | None = None) -> None:
        self._receiver, self._rate_limits = receiver, rate_limits or RateLimits()
        self.n_bytes = 0

    async def receive(self) -> bytes:
        """The next message; UnavailableError when the other side has closed."""
        raw = await self.receive_or_end()
        if raw is None:
            raise UnavailableError("the partner closed the stream in the middle of a block")
        return raw

    async def receive_or_end(self) -> bytes | None:
        """The next message, or None."""
        while (raw := await self._next()) == ALIVE:
            pass
        if raw:
            self.n_bytes += len(raw)
            await asyncio.sleep(min(self._rate_limits.received(len(raw)), MAX_REST_S))
        return raw

    async def _next(self) -> bytes | None:
        return await self._receiver.receive()


class Wire(Inbox):
    """Messages both ways; `n_bytes` counts both.

    The caller gets a DeadlineError after `silence_s` in which nothing has passed in either direction: a
    partner that is frozen, its connection still open, costs no more than that.
    """

    def __init__(self, stream: MessageStream, silence_s: float, rate_limits: RateLimits | None = None) -> None:
        super().__init__(stream, rate_limits)
        self._stream, self._silence_s = stream, silence_s
        self._waiting: set[asyncio.Timeout] = set()

    async def send(self, raw: bytes) -> None:
        """Send one serialised message, then rest as long as the rate limit asks for."""
        self.n_bytes += len(raw)
        async with self._not_silent():
            await self._stream.send(raw)
        rest_s = self._rate_limits.sent(len(raw)) if raw else 0.0
        if rest_s:
            await self.while_alive(asyncio.sleep(rest_s))

    async def while_alive(self, work: Awaitable[T]) -> T:
        """Await what may take longer than a partner bears silence; it is told meanwhile that this side is alive."""
        future = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({future}, timeout=self._silence_s / ALIVE_PER_SILENCE))[0]:
                await self.send(ALIVE)
        except KilohiveError as error:
            # No reason to leave a replica where it is: it may be the last to move. The next message tells.
            logger.debug("A partner is gone while this side works: %s", error)
            return await future
        finally:
            if not future.done():
                future.cancel()
                await asyncio.wait({future})
        return future.result()

    async def _next(self) -> bytes | None:
        async with self._not_silent():
            return await super()._next()

    @asynccontextmanager
    async def _not_silent(self) -> AsyncIterator[None]:
        limit = asyncio.timeout(self._silence_s)
        self._waiting.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            raise DeadlineError(f"the partner has been silent for {self._silence_s:g} s") from None
        finally:
            self._waiting.discard(limit)
        for other in self._waiting:
            if not other.expired():
                other.reschedule(asyncio.get_running_loop().time() + self._silence_s)
